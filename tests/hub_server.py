"""A hub on this machine: what huggingface_hub asks of the real one to list and fetch files, and to push a model."""

import base64
import hashlib
import http.server
import json
import re
import threading
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants


class HubServer:
  """Serves data sets, each with its files by revision, and models that are pushed to it, at `url`.

  A push is one that whoever has `TOKEN` makes into an organisation of his: what git would refuse, or take apart into
  large files and small ones, is here as there.

  >>> with HubServer({"org/sums": {"main": {"train.csv": b"question,answer"}}}) as server:
  ...   server.url.startswith("http://127.0.0.1:")
  True
  """

  TOKEN = "hf_of_the_tests"
  ORGANISATIONS = ("org", "lab")

  def __init__(self, repositories: dict[str, dict[str, dict[str, bytes]]] | None = None):
    self.repositories = repositories or {}
    self.fetched: list[str] = []  # names of the files that were asked for
    self.models: dict[str, dict[str, bytes]] = {}  # as the last commit left them
    self.private: dict[str, bool] = {}  # by model
    self.commits: list[tuple[str, str]] = []  # model and message
    self.large: dict[str, bytes] = {}  # by their digest
    self.faults: dict[str, int] = {}  # statuses that requests whose path has such a part get

  def __enter__(self) -> "HubServer":
    hub = self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def do_HEAD(self):
        self._answer()

      def do_GET(self):
        self._answer()

      def do_POST(self):
        self._take()

      def do_PUT(self):
        self._take()

      def log_message(self, *_):
        pass

      def _answer(self):
        path = unquote(urlsplit(self.path).path)
        if status := self._fault(path):
          return self._send(status, b"", {})
        if path == "/api/whoami-v2":
          return self._json({"name": "me", "orgs": [{"name": name} for name in hub.ORGANISATIONS]}, self._refused())
        if found := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?/?", path):
          kind, repo, part, revision = found[1], found[2], found[3] or "revision", found[4] or "main"
          files = hub._files(repo, revision, kind)
          if files is None or (hub.private.get(repo) and self._refused()):
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
          if part == "revision":
            siblings = [{"rfilename": name} for name in files]
            sha = hub._commit(repo, revision)
            return self._json({"id": repo, "sha": sha, "siblings": siblings, "tags": [], "downloads": 0})
          return self._json(
            [
              {"type": "file", "path": name, "size": len(content), "oid": digest(content)}
              for name, content in files.items()
            ]
          )
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
          kind, repo, revision, name = found.groups()
          files = hub._files(repo, revision, "datasets" if kind else "models") or {}
          if name not in files or (hub.private.get(repo) and self._refused()):
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
          if self.command == "GET":
            hub.fetched.append(name)
          headers = {"ETag": f'"{digest(files[name])}"', "X-Repo-Commit": hub._commit(repo, revision)}
          return self._send(200, files[name], headers)
        return self._send(404, b"", {})

      def _take(self):
        path = unquote(urlsplit(self.path).path)
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if status := self._fault(path):
          return self._send(status, b'{"error": "as the test wants it"}', {"Content-Type": "application/json"})
        if found := re.fullmatch(r"/large/([0-9a-f]{64})", path):
          if hashlib.sha256(content).hexdigest() != found[1]:
            return self._send(400, b"", {})
          hub.large[found[1]] = content
          return self._send(200, b"", {})
        if path == "/api/validate-yaml":
          return self._json({"errors": [], "warnings": []})
        if status := self._refused():
          return self._json({"error": "Invalid credentials in Authorization header"}, status)
        if path == "/api/repos/create":
          asked = json.loads(content)
          repo = f"{asked['organization']}/{asked['name']}"
          if asked["organization"] not in hub.ORGANISATIONS:
            return self._json({"error": f"You don't have the rights to create a model under {repo}"}, 403)
          if repo in hub.models:
            return self._json({"error": "You already created this model repo", "url": f"{hub.url}/{repo}"}, 409)
          hub.models[repo], hub.private[repo] = {}, asked.get("visibility", asked.get("private")) in ("private", True)
          return self._json({"url": f"{hub.url}/{repo}", "name": repo, "id": repo})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        if found and found[1] in hub.models and found[2] == "preupload":
          files = [
            {
              "path": file["path"],
              "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
              "shouldIgnore": False,
            }
            for file in json.loads(content)["files"]
          ]
          return self._json({"files": files})
        if found and found[1] in hub.models:
          return self._commit_files(found[1], [json.loads(line) for line in content.splitlines()])
        if re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
          objects = [
            {**one, "actions": {"upload": {"href": f"{hub.url}/large/{one['oid']}", "header": {}}}}
            for one in json.loads(content)["objects"]
          ]
          return self._json({"transfer": "basic", "objects": objects})
        return self._send(404, b"", {})

      def _commit_files(self, repo, lines):
        files, message = dict(hub.models[repo]), ""
        for line in lines:
          value = line["value"]
          if line["key"] == "header":
            message = value["summary"]
          elif line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
          elif line["key"] == "lfsFile":
            if value["oid"] not in hub.large:
              return self._json({"error": f"{value['path']} was not uploaded"}, 400)
            files[value["path"]] = hub.large[value["oid"]]
          elif line["key"] == "deletedFile":
            del files[value["path"]]
        hub.models[repo] = files
        hub.commits.append((repo, message))
        oid = hub._commit(repo, "main")
        return self._json({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repo}/commit/{oid}"})

      def _refused(self):
        """401 of somebody whom the hub does not know, else 0."""
        return 0 if self.headers.get("Authorization") == f"Bearer {hub.TOKEN}" else 401

      def _fault(self, path):
        return next((status for part, status in hub.faults.items() if part in path), 0)

      def _json(self, answer, status=0):
        self._send(status or 200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

      def _send(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
          self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
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

  def _files(self, repo: str, revision: str, kind: str) -> dict[str, bytes] | None:
    """Of a revision by its name or commit."""
    if kind == "models":
      return self.models.get(repo) if revision in ("main", self._commit(repo, "main")) else None
    by_revision = self.repositories.get(repo, {})
    return next((files for name, files in by_revision.items() if revision in (name, commit(name))), None)

  def _commit(self, repo: str, revision: str) -> str:
    """The commit that a revision's name stands for: of a model another after each push."""
    pushes = sum(name == repo for name, _ in self.commits)
    return commit(f"{repo} {pushes}") if repo in self.models else commit(revision)


def reach(server: HubServer, monkeypatch, cache) -> None:
  """Has huggingface_hub take a server for the hub: in this process, and in those that it starts."""
  monkeypatch.setattr(constants, "ENDPOINT", server.url)
  monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
  monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files then go to the hub itself
  for name, value in (("HF_ENDPOINT", server.url), ("HF_HUB_CACHE", str(cache)), ("HF_HUB_DISABLE_XET", "1")):
    monkeypatch.setenv(name, value)


def commit(revision: str) -> str:
  """The commit that a revision's name stands for; one itself is that."""
  return revision if re.fullmatch("[0-9a-f]{40}", revision) else hashlib.sha1(revision.encode()).hexdigest()


def digest(content: bytes) -> str:
  return hashlib.sha1(content).hexdigest()
