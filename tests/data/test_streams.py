"""Data sets read image by image: tar shards, parquet, URLs; how much is read, and by several processes."""

import collections
import functools
import io
import json
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_blockprune import BlockPruneConfig, BlockPruner, ConfigError, DataError, DataSource
from hf_blockprune.data.batches import CorruptImages, batches, decode_image, load_images, load_pixels
from tests.conftest import NUM_LABELS, tiny_model

PER_SHARD = 5


def encoded(shade, suffix="png", *, noise=False):
    stored = io.BytesIO()
    pixels = np.full((8, 8, 3), shade, dtype=np.uint8)
    picture = Image.fromarray(
        np.random.default_rng(shade).integers(0, 256, pixels.shape, np.uint8) if noise else pixels
    )
    picture.save(stored, {"jpg": "jpeg"}.get(suffix, suffix))
    return stored.getvalue()


def write_shard(path, members):
    with tarfile.open(path, "w") as shard:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder, count, *, suffix="png", label="cls", noise=False):
    """Shards of pictures whose shade is their position, and whose label is that modulo the number of classes."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(count):
        members = {}
        for i in range(PER_SHARD * shard, PER_SHARD * (shard + 1)):
            members[f"{i:04d}.{suffix}"] = encoded(i, suffix, noise=noise)
            if label == "cls":
                members[f"{i:04d}.cls"] = str(i % NUM_LABELS).encode()
            if label == "json":
                members[f"{i:04d}.json"] = json.dumps({"label": i % NUM_LABELS, "caption": "grey"}).encode()
        write_shard(folder / f"shard-{shard:03d}.tar", members)
    return folder


def shades(images):
    return [int(np.asarray(decode_image(record[images.image_column])).max()) for record in images.dataset]


def all_batches(images, processor, accelerator, *, batch_size=4):
    config = tiny_model().config
    return list(batches(images, processor, batch_size=batch_size, accelerator=accelerator, model_config=config))


def labels_of(images, processor, accelerator):
    return torch.cat([b["labels"] for b in all_batches(images, processor, accelerator)]).tolist()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), 4)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["folder", "one", "pattern", "range", "list"])
def test_shards_are_read_in_every_form(shards, processor, accelerator, form, streaming):
    first = shards / "shard-000.tar"
    path = {
        "folder": shards,
        "one": first,
        "pattern": str(shards / "shard-*.tar"),
        "range": str(shards / "shard-{000..003}.tar"),
        "list": sorted(shards.glob("*.tar")),
    }[form]
    found = load_images(DataSource(path, streaming=streaming))
    count = PER_SHARD if form == "one" else 4 * PER_SHARD
    assert found.streaming == streaming
    assert (found.image_column, found.label_column) == ("png", "cls")
    assert shades(found) == list(range(count))
    assert labels_of(found, processor, accelerator) == [i % NUM_LABELS for i in range(count)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp"])
def test_shards_with_every_kind_of_picture(tmp_path, suffix, streaming):
    found = load_images(DataSource(write_shards(tmp_path, 1, suffix=suffix), streaming=streaming))
    assert found.image_column == suffix
    assert np.abs(np.array(shades(found)) - np.arange(PER_SHARD)).max() <= 2


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_inside_of_json_are_found(tmp_path, processor, accelerator, streaming):
    found = load_images(DataSource(write_shards(tmp_path, 2, label="json"), streaming=streaming))
    assert found.label_column == "json.label"
    assert labels_of(found, processor, accelerator) == [i % NUM_LABELS for i in range(2 * PER_SHARD)]


def test_shards_without_labels(tmp_path, processor, accelerator):
    found = load_images(DataSource(write_shards(tmp_path, 1, label=None), streaming=True))
    assert labels_of(found, processor, accelerator) == [-1] * PER_SHARD


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_of_several_kinds_in_one_set_are_refused(tmp_path, streaming):
    shard = write_shard(tmp_path / "mixed.tar", {"0.png": encoded(0), "1.jpg": encoded(1, "jpg")})
    with pytest.raises(DataError, match=r"holds no images that can be read .*same types"):
        load_images(DataSource(shard, streaming=streaming))


def test_no_more_shards_are_opened_than_the_sample_needs(tmp_path, processor, accelerator):
    """Those behind are no archives: opening one would be an error."""
    write_shards(tmp_path, 2)
    for i in range(2, 30):
        (tmp_path / f"shard-{i:03d}.tar").write_bytes(b"no archive")
    found = load_images(DataSource(tmp_path, streaming=True))
    got = all_batches(found.sample(2 * PER_SHARD, seed=0), processor, accelerator)
    assert torch.cat([b["index"] for b in got]).tolist() == list(range(2 * PER_SHARD))
    with pytest.raises(DataError, match=r"cannot be read after 10 images \(ReadError"):
        all_batches(found.sample(2 * PER_SHARD + 1, seed=0), processor, accelerator)


class CountingHandler(SimpleHTTPRequestHandler):
    """Remembers what was asked for, in the server's `requests`."""

    def do_GET(self):
        self.server.requests[self.path.split("?")[0].lstrip("/")] += 1  # type: ignore[attr-defined]
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """Serves a folder over HTTP: a function from the folder to (its address, requests by file)."""
    servers = []

    def start(folder):
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(CountingHandler, directory=str(folder)))
        server.requests = collections.Counter()
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", requests=server.requests)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_calibration_over_the_network_reads_what_it_needs(tmp_path, serve, processor, accelerator):
    site = serve(write_shards(tmp_path, 20))
    source = DataSource(f"{site.url}/shard-{{000..019}}.tar?key=secret", streaming=True)
    found = load_images(source)
    assert found.public_name == f"{site.url}/shard-{{000..019}}.tar"
    site.requests.clear()  # Each shard was looked up once.
    pixels, index = load_pixels(
        found.sample(8, seed=0), processor, accelerator=accelerator, model_config=tiny_model().config
    )
    assert index.tolist() == list(range(8))
    assert len(pixels) == 8
    assert set(site.requests) == {"shard-000.tar", "shard-001.tar"}


def test_pictures_on_the_network_are_read_when_they_are_needed(tmp_path, serve, processor, accelerator):
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
    site = serve(tmp_path)
    found = load_images(DataSource([f"{site.url}/{i}.png" for i in range(6)], streaming=True))
    site.requests.clear()
    (batch,) = all_batches(found.sample(3, seed=0), processor, accelerator)
    assert batch["index"].tolist() == [0, 1, 2]
    assert not site.requests.keys() & {"3.png", "4.png", "5.png"}
    (tmp_path / "1.png").unlink()
    with pytest.raises(DataError, match=r"1\.png: cannot be read \(FileNotFoundError.*try again"):
        all_batches(found, processor, accelerator)


def test_what_is_not_there_is_refused(tmp_path, serve):
    site = serve(tmp_path)
    with pytest.raises(DataError, match=r"nothing\.tar: holds no images that can be read \(FileNotFoundError"):
        load_images(DataSource(f"{site.url}/nothing.tar", streaming=True))


def test_stream_of_parquet_files(tmp_path, processor, accelerator):
    rows = {"image": [{"bytes": encoded(i), "path": None} for i in range(12)], "label": [i % 7 for i in range(12)]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    for i in range(3):
        dataset.shard(3, i, contiguous=True).to_parquet(tmp_path / f"part-{i}.parquet")
    (tmp_path / "part-2.parquet").write_bytes(b"no parquet")
    found = load_images(DataSource(str(tmp_path / "part-*.parquet"), streaming=True))
    assert labels_of(found.sample(8, seed=0), processor, accelerator) == [0, 1, 2, 3, 4, 5, 6, 0]
    one = load_images(DataSource(tmp_path / "part-1.parquet"))
    assert labels_of(one, processor, accelerator) == [4, 5, 6, 0]


def test_stream_of_an_image_folder(images, processor, accelerator):
    whole, stream = load_images(images), load_images(DataSource(images, streaming=True))
    assert stream.streaming
    assert labels_of(stream, processor, accelerator) == labels_of(whole, processor, accelerator)
    assert stream.file_name(5) == whole.file_name(5)


def test_stream_that_went_through_a_function(shards, processor, accelerator):
    """`datasets` no longer knows its columns then."""
    stream = load_images(DataSource(shards, streaming=True)).dataset.map(lambda record: {"twice": 2 * record["cls"]})
    assert stream.features is None
    found = load_images(DataSource(stream, image_column="png", label_column="cls"))
    assert labels_of(found, processor, accelerator) == [i % NUM_LABELS for i in range(4 * PER_SHARD)]


def test_shuffle_buffer_draws_by_the_seed_and_again_the_same(tmp_path):
    found = load_images(DataSource(write_shards(tmp_path, 8), streaming=True, shuffle_buffer=20))
    drawn = found.sample(10, seed=1)
    assert len(set(shades(drawn))) == 10
    assert shades(drawn) == shades(drawn) == shades(found.sample(10, seed=1))
    assert shades(drawn) != shades(found.sample(10, seed=2))
    assert shades(found.sample(4, seed=1)) == shades(drawn)[:4]
    assert max(shades(drawn)) >= 2 * PER_SHARD  # not the first shards alone
    assert found.identity != load_images(DataSource(tmp_path, streaming=True)).identity


def test_shuffle_buffer_of_what_is_no_stream_is_refused(images):
    with pytest.raises(ConfigError, match="add streaming"):
        DataSource(images, shuffle_buffer=5)


def test_corrupt_pictures_of_a_stream_are_named_and_counted(tmp_path, processor, accelerator):
    members = {f"{i:03d}.png": b"no picture" if i == 30 else encoded(i) for i in range(120)}
    found = load_images(DataSource(write_shard(tmp_path / "one.tar", members), streaming=True))
    corrupt = CorruptImages(found.name)
    got = all_batches(found, processor, accelerator, batch_size=16)
    for batch in got:
        corrupt.count(batch)
    corrupt.check()
    assert (corrupt.files, corrupt.seen) == (["030.png"], 120)
    assert torch.cat([b["index"] for b in got]).tolist() == [i for i in range(120) if i != 30]


def test_labels_of_a_stream_are_checked(tmp_path, processor, accelerator):
    members = {"0.png": encoded(0), "0.cls": b"3", "1.png": encoded(1), "1.cls": b"7"}
    found = load_images(DataSource(write_shard(tmp_path / "one.tar", members), streaming=True))
    with pytest.raises(DataError, match="label 7 lies outside the model's 7 classes"):
        all_batches(found, processor, accelerator)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("samples", [1, 13, 20])
def test_processes_share_a_stream_like_a_data_set(shards, processor, world, samples):
    """Every image once, in the batches that one process makes; four shards tempt two processes to take two each."""
    stream = load_images(DataSource(shards, streaming=True)).sample(samples, seed=0)
    whole = load_images(shards)
    listed = load_images(whole.dataset.select(range(samples)))
    seen = []
    for rank in range(world):
        process = SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu"))
        mine, expected = (all_batches(images, processor, process) for images in (stream, listed))
        assert [b["index"].tolist() for b in mine] == [b["index"].tolist() for b in expected]
        assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(mine, expected, strict=True))
        seen += [i for b in mine for i in b["index"].tolist()]
    assert sorted(seen) == list(range(samples))


def test_a_model_is_pruned_and_measured_on_streams(tmp_path, processor):
    config = BlockPruneConfig(block_shape=(8, 8), budget={"metric": "flops", "ratio": 0.7}, calibration={"samples": 12})
    source = DataSource(write_shards(tmp_path, 4, noise=True), streaming=True)
    streamed = BlockPruner(tiny_model(), processor, config)
    streamed.prune(source)
    assert streamed.report()["calibration"]["num_images"] == 12
    assert streamed.evaluate(source).num_images == 4 * PER_SHARD


SCRIPT = """
import sys

import torch
from accelerate import Accelerator
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_blockprune import DataSource
from hf_blockprune.calibration.collect import collect
from hf_blockprune.data.batches import load_images

model_folder, shards, out = sys.argv[1:]
accelerator = Accelerator()
model = AutoModelForImageClassification.from_pretrained(model_folder).double()
targets = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".1." in n}
images = load_images(DataSource(shards, streaming=True, shuffle_buffer=10)).sample(17, seed=0)
processor = AutoImageProcessor.from_pretrained(model_folder)
options = {"accelerator": accelerator, "batch_size": 4, "gradients": True, "block_shape": (16, 32)}
statistics, corrupt = collect(model, images, processor, targets, **options)
if accelerator.is_main_process:
    torch.save((accelerator.num_processes, corrupt.seen, {name: vars(s) for name, s in statistics.items()}), out)
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_make_of_a_stream_what_one_makes(launch, vit_folder, shards, tmp_path):
    """Rows and signs of the Fisher's sketch hang on each image's position."""
    script = tmp_path / "collect.py"
    script.write_text(SCRIPT)
    results = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.pt"
        launch([script, vit_folder, shards, out], processes=processes)
        launched, seen, statistics = torch.load(out)
        assert (launched, seen) == (processes, 17)
        results.append(statistics)
    one, two = results
    assert one.keys() == two.keys() != set()
    for name in one:
        assert one[name]["num_images"] == two[name]["num_images"] == 17
        for key in ("output_weight", "gradient", "block_gradients"):
            scale = float(one[name][key].abs().max())
            torch.testing.assert_close(two[name][key], one[name][key], rtol=1e-6, atol=1e-6 * scale)
