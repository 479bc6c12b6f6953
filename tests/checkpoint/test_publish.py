"""Push to a Hub and load from it, in processes of their own."""

import json
import subprocess

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_blockprune import BlockPruner
from hf_blockprune.checkpoint.inspection import inspect_checkpoint
from hf_blockprune.checkpoint.simulation import simulate_checkpoint
from tests.conftest import WITHOUT_THE_PACKAGE
from tests.fake_hub import Client, FakeHub
from tests.hub.test_loading import CHILD

pytestmark = pytest.mark.slow
REPO = "someone/pruned"

PUSH = """
import json, sys
from hf_blockprune import BlockPruneConfig, BlockPruner, Budget

config = BlockPruneConfig(block_shape=(8, 8), method="magnitude", budget=Budget("flops", 0.75))
pruner = BlockPruner.from_pretrained(sys.argv[1], config)
pruner.prune()
for repo, options in json.loads(sys.argv[2]):
    print(pruner.push_to_hub(repo, **options).pr_url)
pruner.save_pretrained(sys.argv[3])
"""

LOAD = """
import sys
import hf_blockprune
from transformers import AutoModelForImageClassification, pipeline

model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
print(sum(isinstance(module, hf_blockprune.BlockSparseLinear) for module in model.modules()))
print(len(pipeline("image-classification", model=sys.argv[1])(sys.argv[2])))
pruner = hf_blockprune.BlockPruner.from_pretrained(sys.argv[1])
print(pruner.report()["config"]["method"])
"""

LOOK = """
import json, sys
from hf_blockprune import BlockPruneError
from hf_blockprune.checkpoint.inspection import inspect_checkpoint
from hf_blockprune.checkpoint.simulation import simulate_checkpoint

repo, branch, folder = sys.argv[1:]
found = [inspect_checkpoint(repo), inspect_checkpoint(repo, revision=branch), simulate_checkpoint(repo, "systolic-32")]
refused = []
for source in ("someone/missing", folder):
    try:
        inspect_checkpoint(source, revision="v1")
    except BlockPruneError as error:
        refused.append(str(error))
print(json.dumps([*found, refused]))
"""

CLI = "import sys; from hf_blockprune.cli import app; app(sys.argv[1:])"


@pytest.fixture(scope="module")
def pushed(online, small_folder, tmp_path_factory):
    """(Hub, client, folder of the same model) after pushes to main, to a branch and to a pull request."""
    folder = tmp_path_factory.mktemp("push")
    hub, client = online
    pushes = [
        ("pruned", {}),
        (REPO, {"revision": "fewer-flops", "commit_message": "On a branch"}),
        (REPO, {"create_pr": True}),
        ("someone/hidden", {"private": True}),
    ]
    printed = client.run(PUSH, small_folder, json.dumps(pushes), folder / "saved").split()
    assert printed == ["None", "None", f"{hub.endpoint}/{REPO}/discussions/1", "None"]
    return hub, client, folder / "saved"


def test_pushed_models_load_with_the_package(pushed, images):
    hub, client, _ = pushed
    assert client.run(LOAD, REPO, images / "picture_000.png").split() == ["12", "5", "magnitude"]
    assert {"README.md", "config.json", "model.safetensors", "blockprune_layout.py"} <= set(hub.files(REPO))
    card = (hub.repos[REPO]["main"] / "README.md").read_text()
    assert f'from_pretrained("{REPO}")' in card


@pytest.mark.parametrize("revision", ["main", "fewer-flops", "refs/pr/1"])
def test_pushed_models_load_without_the_package(pushed, tmp_path, revision):
    hub, client, saved = pushed
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.save(pixels, tmp_path / "pixels.pt")
    options = {"trust_remote_code": True, "revision": revision}
    client.run(WITHOUT_THE_PACKAGE + CHILD, json.dumps([REPO, str(tmp_path), options]))
    result = torch.load(tmp_path / "result.pt")
    with torch.no_grad():
        expected = AutoModelForImageClassification.from_pretrained(saved)(pixels).logits
    torch.testing.assert_close(result["logits"], expected, rtol=1e-5, atol=1e-5)
    assert all(hub.commit(REPO, revision) in name for name in result["sparse"])


def test_pushed_models_are_inspected_and_simulated_by_name(pushed):
    hub, client, saved = pushed
    hub.add_branch(REPO, "without-report")
    (hub.repos[REPO]["without-report"] / "blockprune_report.json").unlink()
    hub.requests.clear()
    main, branch, simulated, refused = json.loads(client.run(LOOK, REPO, "without-report", saved))
    assert main == inspect_checkpoint(saved)
    assert branch == {**main, "stream_reordered": None} != main
    assert simulated == simulate_checkpoint(saved, "systolic-32")
    assert "missing: no such folder, and no such model on the Hub at revision v1" in refused[0]
    assert "leave it out for a folder" in refused[1]
    assert not any(request.endswith(".py") for request in hub.requests if "/resolve/" in request)


def test_pushed_models_do_not_load_with_neither(pushed, tmp_path):
    torch.save(torch.zeros(1, 3, 32, 32), tmp_path / "pixels.pt")
    done = pushed[1].start(WITHOUT_THE_PACKAGE + CHILD, json.dumps([REPO, str(tmp_path), {}]))
    assert done.returncode != 0
    assert "pass trust_remote_code=True" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "result.pt").exists()


def test_only_what_was_asked_for_is_private(pushed):
    assert pushed[0].private == ["someone/hidden"]


def test_the_command_uploads_a_folder_with_its_card(pushed, tmp_path):
    hub, client, saved = pushed
    values = json.loads(client.run(CLI, "push", saved, "someone/by-hand", "--json", "--quiet"))
    assert values["commit"] == hub.commit("someone/by-hand")
    folder = hub.repos["someone/by-hand"]["main"]
    assert 'from_pretrained("someone/by-hand")' in (folder / "README.md").read_text()
    for name in hub.files("someone/by-hand"):
        assert name == "README.md" or (folder / name).read_bytes() == (saved / name).read_bytes()


def test_a_card_that_somebody_edited_is_uploaded_as_it_is(pushed, tmp_path):
    hub, client, saved = pushed
    edited = tmp_path / "edited"
    subprocess.run(["cp", "-r", str(saved), str(edited)], check=True)
    (edited / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    client.run(CLI, "push", edited, "someone/edited", "--quiet")
    assert (hub.repos["someone/edited"]["main"] / "README.md").read_text() == "---\nlicense: mit\n---\nMine.\n"


def test_what_is_no_part_of_a_checkpoint_stays_at_home(pushed, tmp_path):
    hub, client, saved = pushed
    folder = tmp_path / "work"
    subprocess.run(["cp", "-r", str(saved), str(folder)], check=True)
    (folder / ".git").mkdir()
    (folder / ".git/config").write_text("[remote]\nurl = https://user:secret@example.org\n")
    for name in ("notes.txt", "optimizer.pt", "old.safetensors", ".env"):
        (folder / name).write_text("mine")
    (folder / "LICENSE").write_text("MIT")
    done = client.start(CLI, "push", folder, "someone/tidy", "--json")
    assert done.returncode == 0, done.stderr
    assert set(hub.files("someone/tidy")) == {path.name for path in saved.iterdir()} | {"LICENSE"}
    (line,) = [line for line in done.stderr.splitlines() if "not uploaded" in line]
    assert line.endswith(".env, .git/, notes.txt, old.safetensors, optimizer.pt")
    assert "secret" not in done.stderr


def test_cards_carry_the_newest_figures_of_these_weights(pushed, tmp_path):
    hub, client, saved = pushed
    folder = tmp_path / "measured"
    subprocess.run(["cp", "-r", str(saved), str(folder)], check=True)
    pruner = BlockPruner.from_pretrained(folder)
    pruner.benchmark(seconds=0.0)
    pruner.save_measurements()
    client.run(CLI, "push", folder, "someone/measured", "--quiet")
    card = (hub.repos["someone/measured"]["main"] / "README.md").read_text()
    assert "both models by turns" in card
    assert 'from_pretrained("someone/measured")' in card
    with torch.no_grad():
        pruner.model.classifier.bias += 1
    pruner.model.save_pretrained(folder)  # as somebody does who trained it
    assert "both models by turns" in (folder / "README.md").read_text()
    client.run(CLI, "push", folder, "someone/trained", "--quiet")
    card = (hub.repos["someone/trained"]["main"] / "README.md").read_text()
    assert "both models by turns" not in card
    assert 'from_pretrained("someone/trained")' in card


def test_refusals_are_one_line(pushed, tmp_path):
    _, _, saved = pushed
    with FakeHub({}, uploads=tmp_path, refuse=403) as hub:
        client = Client(tmp_path, hub.endpoint)
        refused = client.start(CLI, "push", saved, "someone/else", "--quiet")
    with client:
        gone = client.start(CLI, "push", saved, "someone/else", "--quiet")
        bad = client.start(CLI, "push", saved, "no/such/name", "--quiet")
    for done in (refused, gone, bad):
        assert done.returncode == 1
        assert len(done.stderr.strip().splitlines()) == 1
        assert "could not be uploaded" in done.stderr
        assert "hf auth login" in done.stderr
