"""What users get when hubs, networks and disks misbehave, for both hubs."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from vllm_metal_hub import errors, store
from vllm_metal_hub.resolver import resolve
from vllm_metal_hub.testing import Fault
from vllm_metal_hub.testing.repository import safetensors

WEIGHTS = safetensors("a", 3_000_000)
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"duplicate",
    "original/consolidated.00.pth": b"duplicate",
}
BOTH = pytest.mark.parametrize("scheme", ["hf", "ms"])
LISTING = {"hf": r"/api/models/org/tiny/tree", "ms": "repo/files"}
CURRENT = {"hf": r"/api/models/org/tiny/revision", "ms": "repo/files"}


@pytest.fixture
def tiny(hub):
    return hub.add("org/tiny", dict(FILES))


def ref(scheme):
    return f"{scheme}://org/tiny"


def sent(hub, what="model.safetensors"):
    return sum(r.sent for r in hub.requests if r.path.split("?")[0].endswith(what) or what in r.path)


def assert_whole(snapshot):
    assert (snapshot.path / "model.safetensors").read_bytes() == WEIGHTS
    assert (snapshot.path / "config.json").read_bytes() == FILES["config.json"]
    assert snapshot.check == "hash"


@BOTH
def test_a_cold_pull_takes_what_the_loader_needs_and_a_warm_one_asks_nobody(hub, tiny, forget, scheme):
    snapshot = resolve(ref(scheme))
    assert_whole(snapshot)
    assert sorted(p.name for p in snapshot.path.rglob("*") if p.is_file()) == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    hub.forget()
    forget()
    assert resolve(ref(scheme)).path == snapshot.path
    assert hub.requests == []


@BOTH
def test_only_the_fetching_process_asks(hub, tiny, scheme):
    resolve(ref(scheme))
    assert os.getpid() not in {r.pid for r in hub.requests}


@BOTH
@pytest.mark.parametrize("kind", ["drop", "reset"])
def test_a_connection_that_breaks_off_is_continued(hub, tiny, events, scheme, kind):
    hub.fail(Fault("/storage/", kind, after=2_000_000))
    assert_whole(resolve(ref(scheme), on_event=events))
    assert sent(hub, "/storage/") < len(WEIGHTS) + 300_000
    assert any("trying again" in note for note in events.notes)


@BOTH
def test_a_server_that_ignores_ranges_starts_over(hub, tiny, scheme):
    hub.fail(Fault("/storage/", "drop", after=1_000_000), Fault("/storage/", "ignore_range"))
    assert_whole(resolve(ref(scheme)))


@BOTH
def test_a_stalled_body_is_given_up_and_continued(hub, tiny, scheme):
    hub.fail(Fault("/storage/", "stall", after=1_000_000, seconds=8.0))
    started = time.monotonic()
    assert_whole(resolve(ref(scheme)))
    assert time.monotonic() - started < 30


@BOTH
def test_changed_bytes_are_fetched_again_once(hub, tiny, events, scheme):
    hub.fail(Fault("/storage/", "corrupt"))
    assert_whole(resolve(ref(scheme), on_event=events))
    assert sum("fetching it again" in note for note in events.notes) == 1


@BOTH
@pytest.mark.parametrize("what", ["/storage/", r"config\.json"])
def test_bytes_that_are_always_changed_are_a_named_integrity_error(hub, tiny, scheme, what):
    hub.fail(Fault(what, "corrupt", times=-1))
    with pytest.raises(errors.IntegrityError, match="another endpoint or source"):
        resolve(f"{scheme}://org/tiny")
    assert not list((hub_home() / "manifests").rglob("*.json"))


def hub_home():
    from vllm_metal_hub.settings import HubSettings

    return HubSettings.from_env().home


@BOTH
def test_too_few_bytes_announced(hub, tiny, monkeypatch, scheme):
    monkeypatch.setenv("VLLM_METAL_HUB_RETRIES", "2")
    hub.fail(Fault("/storage/", "truncate", times=-1, after=1_000))
    with pytest.raises(errors.HubError):
        resolve(ref(scheme))


@BOTH
@pytest.mark.parametrize(("token", "status"), [(None, 401), ("wrong", 403)])
def test_gated_models_are_never_looked_for_elsewhere(hub, monkeypatch, scheme, token, status):
    hub.add("org/tiny", dict(FILES), gate="good")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("MODELSCOPE_API_TOKEN", token)
        monkeypatch.setenv("VLLM_METAL_HUB_TOKEN_TO_MIRROR", "1")
    first, second = ("huggingface", "modelscope") if scheme == "hf" else ("modelscope", "huggingface")
    with pytest.raises(errors.GatedError, match="licence"):
        resolve("org/tiny", sources=(first, second))
    kinds = {"hf": "/api/models/", "ms": "/api/v1/"}
    other = kinds["ms" if scheme == "hf" else "hf"]
    assert not [r for r in hub.requests if r.path.startswith(other)]


@BOTH
def test_a_token_opens_a_gate_only_where_the_user_allows_it(hub, monkeypatch, scheme):
    hub.add("org/tiny", dict(FILES), gate="good")
    monkeypatch.setenv("HF_TOKEN", "good")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "good")
    with pytest.raises(errors.GatedError):
        resolve(ref(scheme))
    assert not any(r.authorized for r in hub.requests)
    monkeypatch.setenv("VLLM_METAL_HUB_TOKEN_TO_MIRROR", "1")
    snapshot = resolve(ref(scheme))
    assert_whole(snapshot)
    manifests = "".join(p.read_text() for p in (hub_home() / "manifests").rglob("*.json"))
    assert "good" not in manifests


@BOTH
def test_a_redirect_to_storage_on_another_port_is_followed_without_the_token(hub, monkeypatch, scheme):
    hub.add("org/tiny", dict(FILES), gate="good")
    monkeypatch.setenv("HF_TOKEN", "good")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "good")
    monkeypatch.setenv("VLLM_METAL_HUB_TOKEN_TO_MIRROR", "1")
    assert_whole(resolve(ref(scheme)))
    stored = [r for r in hub.requests if r.on_storage]
    assert sum(r.sent for r in stored) == len(WEIGHTS)
    assert any(r.authorized for r in hub.requests if not r.on_storage)
    assert not any(r.authorized for r in stored)


@BOTH
@pytest.mark.parametrize("what", ["org/other", "org/tiny@v9"])
def test_not_found_names_what_was_looked_for(hub, tiny, scheme, what):
    with pytest.raises(errors.NotFoundError, match=what):
        resolve(f"{scheme}://{what}")


def test_not_found_goes_on_only_where_the_user_listed_both(hub, tiny):
    hub.fail(Fault("/api/models/", "status", times=-1, status=404, headers={"X-Error-Code": "RepoNotFound"}))
    with pytest.raises(errors.NotFoundError):
        resolve("org/tiny", sources=("huggingface",))
    assert resolve("org/tiny", sources=("huggingface", "modelscope")).source == "modelscope"


@BOTH
def test_too_many_requests_waits_as_long_as_the_hub_says(hub, tiny, events, scheme):
    hub.fail(Fault(LISTING[scheme], "status", status=429, headers={"Retry-After": "1"}))
    hub.fail(Fault("/storage/", "status", status=429, headers={"Retry-After": "1"}))
    assert_whole(resolve(ref(scheme), on_event=events))
    assert any("trying again in 1.0 s" in note for note in events.notes)


@BOTH
def test_a_hub_that_is_briefly_unavailable(hub, tiny, scheme):
    hub.fail(Fault(LISTING[scheme], "status", times=2), Fault("/storage/", "status", times=2))
    assert_whole(resolve(ref(scheme)))


@BOTH
def test_a_listing_that_hangs_is_asked_again(hub, tiny, scheme):
    hub.fail(Fault(LISTING[scheme], "hang", seconds=8.0))
    assert_whole(resolve(ref(scheme)))


@BOTH
def test_data_that_hang_are_asked_again(hub, tiny, scheme):
    hub.fail(Fault("/storage/", "hang", seconds=8.0))
    assert_whole(resolve(ref(scheme)))


@pytest.mark.parametrize(
    ("first", "second", "route"),
    [("huggingface", "modelscope", "/api/models/"), ("modelscope", "huggingface", "/api/v1/")],
)
def test_the_other_hub_helps_when_one_is_down(hub, tiny, events, monkeypatch, first, second, route):
    monkeypatch.setenv("VLLM_METAL_HUB_RETRIES", "2")
    hub.fail(Fault(route, "status", times=-1))
    snapshot = resolve("org/tiny", sources=(first, second), on_event=events)
    assert_whole(snapshot)
    assert snapshot.source == second
    assert any(first in note for note in events.notes)


@BOTH
def test_storage_that_stays_unavailable_is_a_network_error_and_keeps_the_part(hub, tiny, monkeypatch, scheme):
    monkeypatch.setenv("VLLM_METAL_HUB_RETRIES", "1")
    hub.fail(Fault("/storage/", "drop", after=1_000_000))
    with pytest.raises(errors.NetworkError):
        resolve(ref(scheme))
    hub.fail(Fault("/storage/", "status", times=-1))
    with pytest.raises(errors.NetworkError, match="503"):
        resolve(ref(scheme))
    assert part_bytes() > 900_000
    with pytest.raises(errors.OfflineError):
        resolve(ref(scheme), offline=True)


def test_a_model_has_another_name_at_the_other_hub(hub, tiny, monkeypatch, forget):
    hub.add("them/renamed", dict(FILES))
    hub_home().mkdir(parents=True)
    (hub_home() / "aliases.toml").write_text('[modelscope]\n"org/tiny" = "them/renamed"\n')
    hub.fail(Fault("/api/models/", "status", times=-1, status=404, headers={"X-Error-Code": "RepoNotFound"}))
    snapshot = resolve("org/tiny", sources=("huggingface", "modelscope"))
    assert (snapshot.repo, snapshot.source) == ("them/renamed", "modelscope")
    forget()
    hub.forget()
    assert resolve("org/tiny", offline=True).path == snapshot.path
    assert hub.requests == []
    assert [item.manifest.repo for item in store.find("org/tiny")] == ["them/renamed"]
    assert resolve("ms://org/tiny").repo == "org/tiny"


@pytest.mark.parametrize("text", ["[nowhere]\n", "[modelscope]\nx = 1\n", "not toml"])
def test_a_table_of_names_that_cannot_be_right(hub, tmp_path, monkeypatch, text):
    (tmp_path / "names.toml").write_text(text)
    monkeypatch.setenv("VLLM_METAL_HUB_ALIASES", str(tmp_path / "names.toml"))
    with pytest.raises(errors.UsageError, match="aliases"):
        resolve("org/tiny")


def test_a_namesake_elsewhere_must_have_the_recorded_weights(hub, tiny, monkeypatch, forget):
    monkeypatch.setenv("VLLM_METAL_HUB_RETRIES", "1")
    resolve("org/tiny", sources=("modelscope",))
    tiny.files = {**FILES, "model.safetensors": safetensors("a", 3_000_000, fill=9)}
    forget()
    with pytest.raises(errors.IntegrityError, match="another owner"):
        resolve("org/tiny", sources=("huggingface",))


@BOTH
def test_a_hub_that_refuses_connections(hub, tiny, monkeypatch, scheme):
    monkeypatch.setenv("VLLM_METAL_HUB_RETRIES", "2")
    hub.close()
    with pytest.raises(errors.NetworkError, match="Check the network"):
        resolve(ref(scheme))


@BOTH
def test_a_pull_that_was_killed_goes_on_where_it_was(hub, tiny, scheme):
    hub.fail(Fault("/storage/", "stall", after=2_000_000, seconds=60.0))
    child = subprocess.Popen(
        [sys.executable, "-c", f"from vllm_metal_hub import resolve; resolve('{ref(scheme)}')"],
        env={**os.environ, "VLLM_METAL_HUB_TIMEOUT": "50"},
    )
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline and part_bytes() < 1_500_000:
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert part_bytes() >= 1_500_000
    hub.forget()
    assert_whole(resolve(ref(scheme)))
    assert sent(hub, "/storage/") < 1_600_000


def part_bytes():
    from vllm_metal_hub.settings import HubSettings

    settings = HubSettings.from_env()
    parts = [*settings.hf_cache.rglob("*.part"), *settings.home.rglob("parts/*")]
    return max((p.stat().st_size for p in parts if p.is_file()), default=0)


@BOTH
def test_two_processes_pull_once(hub, tiny, scheme):
    hub.fail(Fault("/storage/", "stall", after=1_000_000, seconds=2.0))
    program = f"from vllm_metal_hub import resolve; print(resolve('{ref(scheme)}').path)"
    env = {**os.environ, "VLLM_METAL_HUB_TIMEOUT": "10"}
    children = [
        subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    paths = {child.communicate(timeout=90)[0] for child in children}
    assert len(paths) == 1
    assert sent(hub, "/storage/") == len(WEIGHTS)


@BOTH
def test_a_file_cut_short_on_disk_is_repaired_online_and_refused_offline(hub, tiny, forget, monkeypatch, scheme):
    snapshot = resolve(ref(scheme))
    (snapshot.path / "model.safetensors").resolve().write_bytes(WEIGHTS[:1000])
    forget()
    with pytest.raises(errors.OfflineError, match="1,000 bytes instead of"):
        resolve(ref(scheme), offline=True)
    assert_whole(resolve(ref(scheme)))


@BOTH
def test_a_flipped_bit_on_disk_is_seen_and_repaired(hub, tiny, forget, scheme):
    snapshot = resolve(ref(scheme))
    target = (snapshot.path / "model.safetensors").resolve()
    target.write_bytes(WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1]))
    forget()
    assert_whole(resolve(ref(scheme)))


@BOTH
def test_new_shards_upstream_never_mix_with_old_ones(hub, forget, scheme):
    index = b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    two = {"config.json": b"{}", "model.safetensors.index.json": index}
    two |= {f"model-0000{i}-of-00002.safetensors": safetensors("a", 1000, i) for i in (1, 2)}
    repository = hub.add("org/tiny", two)
    old = resolve(ref(scheme))
    repository.files = dict(FILES)
    forget()
    assert resolve(ref(scheme)).path == old.path
    new = resolve(ref(scheme), update="always")
    assert_whole(new)
    assert [p.name for p in new.path.glob("*.safetensors")] == ["model.safetensors"]
    assert len(list(old.path.glob("*.safetensors"))) == 2


@BOTH
def test_checking_for_an_update_falls_back_to_the_pinned_copy(hub, tiny, forget, events, scheme):
    snapshot = resolve(ref(scheme))
    hub.fail(Fault(CURRENT[scheme], "status", times=-1))
    again = resolve(ref(scheme), update="check", on_event=events)
    assert again.path == snapshot.path
    assert any("Using the copy pulled before" in note for note in events.notes)


@BOTH
def test_checking_for_an_update_costs_one_request(hub, forget, scheme):
    index = b'{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'
    files = {"config.json": b"{}", "model.safetensors.index.json": index, "model-00001-of-00001.safetensors": b"1"}
    repository = hub.add("org/tiny", dict(files))
    old = resolve(ref(scheme))
    hub.forget()
    assert resolve(ref(scheme), update="check").path == old.path
    assert [bool(re.search(CURRENT[scheme], r.path)) for r in hub.requests] == [True]
    repository.files = {**files, "config.json": b'{"new": 1}'}
    assert (resolve(ref(scheme), update="check").path / "config.json").read_bytes() == b'{"new": 1}'


@BOTH
def test_offline_with_and_without_a_copy(hub, tiny, forget, scheme):
    with pytest.raises(errors.OfflineError, match="vllm-metal pull"):
        resolve(ref(scheme), offline=True)
    path = resolve(ref(scheme)).path
    hub.forget()
    forget()
    assert resolve(ref(scheme), offline=True).path == path
    assert hub.requests == []


@BOTH
def test_no_room_is_known_before_the_first_byte(hub, tiny, monkeypatch, scheme):
    from vllm_metal_hub.testing import responses

    def huge(path, content):
        return {"type": "file", "oid": "0" * 40, "size": 10**16, "path": path, "lfs": None}

    if scheme == "ms":
        listing = [{"Path": p, "Type": "blob", "Size": 10**16, "Sha256": "0" * 64} for p in FILES]
        monkeypatch.setattr(responses, "_ms_listing", lambda files: listing)
    else:
        monkeypatch.setattr(responses, "_tree_item", huge)
    with pytest.raises(errors.DiskFullError, match="Free some space"):
        resolve(ref(scheme))
    assert sent(hub, "/storage/") == 0


@BOTH
def test_room_that_runs_out_is_a_disk_error_and_leaves_no_part(hub, tiny, scheme):
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"import sys; from vllm_metal_hub.cli import main; sys.exit(main(['pull', '{ref(scheme)}']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 8, done.stderr
    assert "Free some space" in done.stderr
    assert part_bytes() == 0


def test_a_cache_that_cannot_be_made_says_so(hub, tiny, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "/dev/null/hub")
    with pytest.raises(errors.HubError, match="writable"):
        resolve("hf://org/tiny")


def obey_permissions():
    """Let permissions hold for root too: drop the capabilities that override them, before the program starts."""
    libc = ctypes.CDLL(None)
    if os.geteuid() == 0 and any(libc.prctl(24, capability, 0, 0, 0) for capability in (1, 2)):
        os._exit(77)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="drops Linux capabilities")
@BOTH
def test_a_read_only_cache_serves_what_it_has_and_refuses_the_rest(hub, tiny, tmp_path, scheme):
    path = resolve(ref(scheme)).path
    hub.add("org/other", dict(FILES))
    hub.forget()
    writable = [folder for folder in (tmp_path, *tmp_path.rglob("*")) if folder.is_dir() and not folder.is_symlink()]
    env = {**os.environ, "VLLM_METAL_HUB_RESOLVED": "{}"}

    def pull(name):
        return subprocess.run(
            [sys.executable, "-m", "vllm_metal_hub", "pull", f"{scheme}://{name}"], env=env, text=True,
            capture_output=True, check=False, preexec_fn=obey_permissions,
        )  # fmt: skip

    try:
        for folder in writable:
            folder.chmod(0o555)
        again, other = pull("org/tiny"), pull("org/other")
    finally:
        for folder in writable:
            folder.chmod(0o755)
    assert (again.returncode, again.stdout.strip()) == (0, str(path)), again.stderr
    assert other.returncode == 1
    assert "expected readable and writable caches" in other.stderr
    assert "Traceback" not in other.stderr
    assert hub.requests == []


@BOTH
def test_a_clock_that_jumps_costs_a_hash_and_no_request(hub, tiny, forget, scheme):
    snapshot = resolve(ref(scheme))
    future = time.time() + 10**8
    for path in snapshot.path.rglob("*"):
        os.utime(path, (future, future))
    hub.forget()
    forget()
    assert resolve(ref(scheme)).path == snapshot.path
    assert hub.requests == []


@BOTH
def test_a_login_page_in_between_is_no_model(hub, scheme, monkeypatch):
    monkeypatch.setenv("VLLM_METAL_HUB_RETRIES", "1")
    hub.fail(Fault("/api/", "status", times=-1, status=200))
    with pytest.raises(errors.HubError):
        resolve(ref(scheme))
