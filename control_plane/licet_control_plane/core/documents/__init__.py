"""The documents operators write: read from YAML, validated as a whole, translated to ``licet.domain.catalog``.

Pure: files come in as text. ``validate`` is the way in; the fields of each kind stand in ``sources``.
"""

from licet_control_plane.core.documents.findings import DocumentError
from licet_control_plane.core.documents.reading import SourceFile
from licet_control_plane.core.documents.validation import Validated, validate

__all__ = ["DocumentError", "SourceFile", "Validated", "validate"]
