"""A service that asks before it acts: an HTTP endpoint in front of a language model.

Run a stack with `licet dev`, push a catalog and create a license as examples/README.md says, then:

    python examples/service.py
    curl -i localhost:8080 -H 'X-Tenant: acme' -H 'X-User: ada' -d 'Why is the sky blue?'
"""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import licet

client = licet.Client(fallback="deny")  # what to answer, should the sidecar be away


class Generate(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        prompt = self.rfile.read(int(self.headers["Content-Length"])).decode()
        decision = client.check(
            self.headers["X-Tenant"],
            "llm.generate",
            subject=licet.Subject(self.headers["X-User"], type="user", roles=["developer"]),
            quantities={"input": len(prompt.split()), "output": 64},
            context={"model": "small"},
        )
        self.send_response(200 if decision else 402)
        self.end_headers()
        self.wfile.write(f"{'(the answer)' if decision else decision.message or decision.reason.name}\n".encode())


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", 8080), Generate).serve_forever()
