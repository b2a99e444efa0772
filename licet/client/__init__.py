"""The client SDK: ``Client`` and ``AsyncClient``, the decisions they return and the errors they raise.

What a request is made of and how an answer is read are pure functions in ``messages``; what happens when a call fails
is decided in ``failure``; ``blocking`` and ``aio`` only move bytes. Rests on grpcio and protobuf alone.
"""
