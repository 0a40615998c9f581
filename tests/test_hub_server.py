"""Tests the server that other tests push to and read from, with the Hub's own client."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import HubServer
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError
from huggingface_hub.errors import RepositoryNotFoundError as NoRepo
from huggingface_hub.errors import RevisionNotFoundError as NoRevision


# The Hub's client passes files to httpx in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

NAME = "user/saes"


@pytest.fixture
def waits(monkeypatch):
    """Sets the client online, without Xet and the user's login. Returns the list of its waits, which take no time."""
    waits: list[float] = []
    for setting, value in (("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True), ("DOWNLOAD_CHUNK_SIZE", 1000)):
        monkeypatch.setattr(f"huggingface_hub.constants.{setting}", value)
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", SimpleNamespace(sleep=waits.append))
    monkeypatch.setattr("huggingface_hub.utils._headers.detect_agent", lambda: None)
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    return waits


@pytest.fixture
def hub(tmp_path, waits):
    with HubServer(tmp_path / "hub", users={"secret": "user", "other": "someone"}) as hub:
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token="secret")


@pytest.fixture
def folder(tmp_path):
    """A run of two heads, whose weights the Hub stores as large files."""
    for i in (2, 10):
        (tmp_path / "run" / f"layers.{i}").mkdir(parents=True)
        (tmp_path / "run" / f"layers.{i}" / "config.json").write_text(f'{{"layer": {i}}}')
        (tmp_path / "run" / f"layers.{i}" / "model.safetensors").write_bytes(random.Random(i).randbytes(20_000))
    (tmp_path / "run" / "README.md").write_text("# SAEs")
    return tmp_path / "run"


def _push(api, folder, **options) -> str:
    api.create_repo(NAME, exist_ok=True)
    return api.upload_folder(repo_id=NAME, folder_path=folder, commit_message="saes", **options).oid


def _refusal(kind, call, *arguments, **options) -> int:
    with pytest.raises(kind) as error:
        call(*arguments, **options)
    return error.value.response.status_code


def _uploads(hub) -> int:
    return sum(line.startswith("PUT /lfs/") for line in hub.requests)


def test_a_repo_is_created_once_by_whoever_may(hub, api):
    assert api.whoami()["name"] == "user"
    assert api.create_repo(NAME).repo_id == NAME
    assert _refusal(HfHubHTTPError, api.create_repo, NAME) == 409
    assert api.create_repo(NAME, exist_ok=True) == f"{hub.url}/{NAME}"
    assert _refusal(HfHubHTTPError, api.create_repo, "someone/saes", exist_ok=True) == 403
    assert _refusal(HfHubHTTPError, api.create_repo, "user/more", token=False) == 401
    assert _refusal(HfHubHTTPError, api.whoami, token="wrong") == 401
    assert [message for _, message, _ in hub.commits(NAME)] == ["initial commit"]


def test_a_folder_is_one_commit_and_pushing_it_again_sends_only_what_changed(hub, api, folder):
    oid = _push(api, folder)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path: content for path, content in hub.files(NAME).items() if path != ".gitattributes"} == files
    assert hub.commits(NAME)[1:] == [(oid, "saes", sorted(files))] and _uploads(hub) == 2
    assert _push(api, folder) == oid and len(hub.commits(NAME)) == 2 and _uploads(hub) == 2
    (folder / "layers.2" / "model.safetensors").write_bytes(b"new")
    assert _push(api, folder) != oid and _uploads(hub) == 3
    assert hub.commits(NAME)[2][2] == ["layers.2/model.safetensors"]
    # A file whose content the Hub has under another name is not uploaded.
    (folder / "copy.safetensors").write_bytes(b"new")
    _push(api, folder)
    assert _uploads(hub) == 3 and hub.files(NAME)["copy.safetensors"] == b"new"


def test_listings_come_in_pages_and_tell_sizes_and_ids(hub, api, folder):
    _push(api, folder)
    hub.page_size = 3
    hub.requests.clear()
    tree = {entry.path: entry for entry in api.list_repo_tree(NAME, recursive=True, expand=True)}
    assert list(tree) == sorted({*hub.files(NAME), "layers.2", "layers.10"})
    assert len(hub.requests) == 3 and tree["layers.2"].last_commit.title == "saes"
    weights = tree["layers.2/model.safetensors"]
    assert (weights.size, weights.lfs.size) == (20_000, 20_000) and tree["README.md"].lfs is None
    assert [entry.path for entry in api.list_repo_tree(NAME)][2:] == ["layers.10", "layers.2"]
    inside = [entry.path for entry in api.list_repo_tree(NAME, "layers.2")]
    assert inside == ["layers.2/config.json", "layers.2/model.safetensors"]
    assert api.get_paths_info(NAME, ["layers.2/model.safetensors", "nothing"])[0].lfs == weights.lfs
    sibling = {file.rfilename: file for file in api.model_info(NAME, files_metadata=True).siblings}[weights.path]
    assert (sibling.size, sibling.blob_id, sibling.lfs) == (20_000, weights.blob_id, weights.lfs)


def test_a_commit_is_read_by_its_id_and_a_branch_by_its_name(hub, api, folder, tmp_path):
    first = _push(api, folder)
    api.create_branch(NAME, branch="wip/a")
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="README.md", repo_id=NAME, revision="wip/a")
    for revision, content in ((first, "# SAEs"), ("wip/a", "{}")):
        path = api.hf_hub_download(NAME, "README.md", revision=revision, cache_dir=tmp_path / "cache")
        assert Path(path).read_text() == content
    assert hub.files(NAME)["README.md"] == b"# SAEs"
    branches = {ref.name: ref.target_commit for ref in api.list_repo_refs(NAME).branches}
    assert branches["main"] == first and branches["wip/a"] == hub.commits(NAME, "wip/a")[-1][0]
    assert len(api.list_repo_commits(NAME, revision="wip/a")) == 3
    assert _refusal(HfHubHTTPError, api.create_branch, NAME, branch="wip/a") == 409
    assert _refusal(NoRevision, api.model_info, NAME, revision="nothing") == 404
    assert _refusal(EntryNotFoundError, api.hf_hub_download, NAME, "nothing", cache_dir=tmp_path / "cache") == 404


def test_deletions_and_the_expected_parent(hub, api, folder):
    first = _push(api, folder)
    operations = [CommitOperationDelete("layers.2/"), CommitOperationAdd("new.json", b"{}")]
    commit = dict(repo_id=NAME, operations=operations, commit_message="less")
    assert _refusal(HfHubHTTPError, api.create_commit, **commit, parent_commit=hub.commits(NAME)[0][0]) == 412
    assert hub.commits(NAME)[-1][0] == first
    api.create_commit(**commit, parent_commit=first)
    assert hub.commits(NAME)[-1][2] == ["layers.2/config.json", "layers.2/model.safetensors", "new.json"]
    assert "layers.2/config.json" not in hub.files(NAME) and "layers.2/config.json" in hub.files(NAME, first)
    assert _refusal(EntryNotFoundError, api.delete_file, "nothing", NAME) == 404


def test_private_and_gated_repos_are_refused_as_the_hub_refuses(tmp_path, waits):
    for name in ("private", "gated"):
        (tmp_path / "hub" / "user" / name).mkdir(parents=True)
        (tmp_path / "hub" / "user" / name / "config.json").write_text(name)
    options = dict(private=("user/private",), gated=("user/gated",), users={"secret": "user", "other": "someone"})
    with HubServer(tmp_path / "hub", **options) as hub:
        for name, kind, status in (("private", NoRepo, 404), ("gated", GatedRepoError, 403), ("nothing", NoRepo, 404)):
            options = dict(endpoint=hub.url, cache_dir=tmp_path / "cache")
            assert _refusal(kind, hf_hub_download, f"user/{name}", "config.json", token=False, **options) == 401
            assert _refusal(kind, hf_hub_download, f"user/{name}", "config.json", token="other", **options) == status
        path = hf_hub_download("user/private", "config.json", token="secret", **options)
        assert Path(path).read_text() == "private"
        api = HfApi(endpoint=hub.url, token="other")
        assert _refusal(HfHubHTTPError, api.upload_file, path_or_fileobj=b"", path_in_repo="a", repo_id=NAME) == 404
        HfApi(endpoint=hub.url, token="secret").create_repo(NAME, private=True)
        assert _refusal(NoRepo, api.model_info, NAME, token=False) == 401


def test_a_download_goes_on_where_its_connection_was_cut(hub, api, folder, tmp_path, monkeypatch):
    _push(api, folder)
    # With Xet allowed, the server's answers must still lead the client to plain downloads.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    hub.cut("layers.10/model.safetensors", after=7_500, times=2)
    path = snapshot_download(NAME, endpoint=hub.url, cache_dir=tmp_path / "cache")
    content = Path(path, "layers.10", "model.safetensors").read_bytes()
    assert content == hub.files(NAME)["layers.10/model.safetensors"]
    assert [headers["range"] for headers in hub.headers if "range" in headers] == ["bytes=7000-", "bytes=14000-"]


def test_busy_and_broken_answers_are_retried_as_long_as_told(hub, api, folder, waits):
    hub.fail("PUT", "/lfs/", status=429, headers={"Retry-After": "20"})
    hub.fail("POST", "/preupload/", status=429, headers={"RateLimit": '"api";r=0;t=55'})
    hub.fail("POST", "/objects/batch", status=503, times=2)
    oid = _push(api, folder)
    assert waits == [56.0, 1, 2, 21.0] and hub.commits(NAME)[-1][0] == oid


def test_what_goes_wrong_before_the_commit_leaves_the_repo_as_it_was(hub, api, folder):
    api.create_repo(NAME)
    before = hub.commits(NAME)
    hub.cut("/lfs/", after=5_000, times=100)
    with pytest.raises(RuntimeError, match="Error while uploading 'layers"):
        _push(api, folder)
    assert hub.commits(NAME) == before and not hub.repo(NAME).objects and _uploads(hub) > 6
    hub.mend()
    hub.fail("POST", f"/{NAME}/commit/", status=500)
    assert _refusal(HfHubHTTPError, _push, api, folder) == 500
    assert hub.commits(NAME) == before and len(hub.repo(NAME).objects) == 2
    uploads = _uploads(hub)
    assert _push(api, folder) == hub.commits(NAME)[-1][0] and _uploads(hub) == uploads


def test_a_commit_whose_answer_is_lost_is_there(hub, api, folder):
    hub.cut(f"/{NAME}/commit/", answer=True)
    with pytest.raises(Exception, match="peer closed|disconnected"):
        _push(api, folder)
    assert len(hub.commits(NAME)) == 2
    assert _push(api, folder) == hub.commits(NAME)[1][0] and len(hub.commits(NAME)) == 2
