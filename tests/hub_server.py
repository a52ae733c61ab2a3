"""A hub of data sets on this machine: what huggingface_hub asks of the real one to list and fetch files."""

import hashlib
import http.server
import json
import re
import threading
from urllib.parse import unquote, urlsplit


class HubServer:
  """Serves repositories of data sets, each with its files by revision, at `url`.

  >>> with HubServer({"org/sums": {"main": {"train.csv": b"question,answer"}}}) as server:
  ...   server.url.startswith("http://127.0.0.1:")
  True
  """

  def __init__(self, repositories: dict[str, dict[str, dict[str, bytes]]]):
    self.repositories = repositories
    self.fetched: list[str] = []  # names of the files that were asked for

  def __enter__(self) -> "HubServer":
    hub = self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def do_HEAD(self):
        self._answer()

      def do_GET(self):
        self._answer()

      def log_message(self, *_):
        pass

      def _answer(self):
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?/?", path):
          repo, kind, revision = found[1], found[2] or "revision", found[3] or "main"
          files = hub._files(repo, revision)
          if files is None:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
          if kind == "revision":
            siblings = [{"rfilename": name} for name in files]
            answer = {"id": repo, "sha": commit(revision), "siblings": siblings, "tags": [], "downloads": 0}
          else:
            answer = [
              {"type": "file", "path": name, "size": len(content), "oid": digest(content)}
              for name, content in files.items()
            ]
          return self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
          repo, revision, name = found.groups()
          files = hub._files(repo, revision) or {}
          if name not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
          if self.command == "GET":
            hub.fetched.append(name)
          headers = {"ETag": f'"{digest(files[name])}"', "X-Repo-Commit": commit(revision)}
          return self._send(200, files[name], headers)
        return self._send(404, b"", {})

      def _send(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
          self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
          self.wfile.write(content)

    self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self._server.server_port}"
    self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._server.shutdown()
    self._server.server_close()
    self._thread.join()

  def _files(self, repo: str, revision: str) -> dict[str, bytes] | None:
    """Of a revision by its name or commit."""
    by_revision = self.repositories.get(repo, {})
    return next((files for name, files in by_revision.items() if revision in (name, commit(name))), None)


def commit(revision: str) -> str:
  """The commit that a revision's name stands for; one itself is that."""
  return revision if re.fullmatch("[0-9a-f]{40}", revision) else hashlib.sha1(revision.encode()).hexdigest()


def digest(content: bytes) -> str:
  return hashlib.sha1(content).hexdigest()
