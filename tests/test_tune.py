"""Tiles that were timed: how they are found, kept in a file, and given to kernels. Clock and devices are made up."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import jaxquant as jq
from jaxquant import cli
from jaxquant.checkpoints.directory import write_whole
from jaxquant.kernels import mosaic_tpu, mosaic_tpu_kernels, tune
from jaxquant.kernels.matmul import chosen
from jaxquant.kernels.tuned import Product, TunedTiles, read_tiles
from jaxquant.kernels.tuning import GpuTiles, TpuTiles, gpu_tiles

SHAPE = (512, 1024)
W4 = Product(512, 1024, 4, 128, False)


def clock(quickest):
    """Narrow tiles do not compile; of the others, the nearer to `quickest`, the quicker."""

    def seconds(x, q):
        ((tokens, tiles),) = q.prepared.tiles
        assert tokens == len(x)
        assert chosen(x, q) == ("mosaic_tpu" if q.prepared.platform == "tpu" else chosen(x, q))
        if tiles.tile_n < 512 and q.prepared.platform == "tpu":
            raise NotImplementedError("too narrow\nsaid the compiler")
        return 1e-6 * (1 + abs(tiles.tile_n - quickest[0]) + abs(tiles.tile_k - quickest[1]))

    return seconds


@pytest.fixture(scope="module")
def found():
    return tune.tune("v5e", [SHAPE], [1, 32], ["w4g128", "w8a8"], timer=clock((512, 512)))


def test_the_quickest_candidates_are_taken_and_those_that_fail_are_reported(found):
    tuned, failed = found
    assert tuned.chip == "v5e"
    assert [(product, m) for product, m, _ in tuned.rows] == [
        (product, m) for product in (W4, Product(512, 1024, 8, 512, True)) for m in (1, 32)
    ]
    assert all(tiles.tile_n == 512 for _, _, tiles in tuned.rows)
    assert len(failed) > 0
    assert failed[0].startswith("w4g128 1×512×1024 TpuTiles(tile_m=1, tile_n=256")
    assert all(line.endswith("NotImplementedError: too narrow") for line in failed)


def test_gpu_candidates_divide_the_outputs():
    tuned, failed = tune.tune("h100", [(512, 384)], [1, 100, 1025], ["w8"], timer=clock((128, 64)))
    assert [(m, t.tile_m, t.tile_n, t.tile_k) for _, m, t in tuned.rows] == [(1, 8, 128, 64), (100, 128, 128, 64)]
    assert failed == []
    assert gpu_tiles("h100", 70, 384, tuned.of(jq.quantize(jnp.ones((512, 384)), jq.int8()))) == tuned.rows[1][2]
    assert gpu_tiles("h100", 300, 384, ()).tile_k == 128  # the table's


def test_nothing_that_runs_is_an_error():
    def refuse(x, q):
        raise ValueError("no")

    with pytest.raises(ValueError, match=r"no candidate ran on v5e: w8 1×128×128 TpuTiles.*ValueError: no"):
        tune.tune("v5e", [(128, 128)], [1], ["w8"], timer=refuse)
    with pytest.raises(ValueError, match=r"weights=\['w5'\] are unknown; choose of w4g128"):
        tune.tune("v5e", weights=["w5"])


def test_a_file_gives_kernels_their_tiles(found, tmp_path, monkeypatch):
    tuned, failed = found
    write_whole(tmp_path / "tiles.json", tuned.to_json({"failed": failed}))
    assert [path.name for path in tmp_path.iterdir()] == ["tiles.json"]
    assert read_tiles(tmp_path / "tiles.json") == tuned
    built, product = [], mosaic_tpu_kernels.product
    monkeypatch.setattr(
        mosaic_tpu_kernels, "product", lambda *args, **kw: (built.append(args[4]), product(*args, **kw))[1]
    )
    rng = np.random.default_rng(0)
    w = jq.quantize(jnp.asarray(rng.normal(size=SHAPE), jnp.bfloat16), jq.int4(group_size=128))
    x = jnp.asarray(rng.normal(size=(1, 512)), jnp.bfloat16)
    run = jax.jit(lambda x, q: mosaic_tpu.kernel_matmul(x, q, jnp.float32, pltpu.InterpretParams()))
    table, own = jq.prepare(w, "tpu", "v5e"), jq.prepare(w, "tpu", "v5e", tiles=tmp_path / "tiles.json")
    results = [run(x, q) for q in (table, own, table)]
    assert [(t.tile_n, t.tile_k) for t in built] == [(1024, 512), (512, 512)]  # and no third time
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5)
    other = jq.prepare(jq.quantize(jnp.ones((256, 1024)), jq.int8()), "tpu", "v5e", tiles=tmp_path / "tiles.json")
    assert other.prepared.tiles == ()
    assert jq.prepare(own, None).prepared is None
    with pytest.raises(ValueError, match=r"tiles='.*' are for chip='v5e', not 'v6e'; tune on that"):
        jq.prepare(w, "tpu", "v6e", tiles=tmp_path / "tiles.json")


TILES = {"tile_m": 8, "tile_n": 128, "tile_k": 64, "stages": 4}
GOOD = {"format": "jaxquant tiles, 1", "chip": "h100", "rows": [{**W4._asdict(), "tokens": 1, "tiles": TILES}]}


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "1", '{"a": 1}', "[" * 10**5, "\xff", json.dumps({**GOOD, "format": "jaxquant tiles, 2"})),
        *(json.dumps({**GOOD, "chip": chip}) for chip in ("a100", "v5e", None, [])),
        *(json.dumps({**GOOD, "rows": rows}) for rows in (None, 1, [1], [{}], ["x"])),
        *(json.dumps({**GOOD, "rows": [{**GOOD["rows"][0], **change}]}) for change in (
            {"tokens": 0}, {"tokens": "1"}, {"rounded": 1}, {"tiles": {}}, {"tiles": []}, {"tiles": "x"},
            {"tiles": {**TILES, "stages": 2.5}}, {"tiles": {**TILES, "x": 1}},
            {"tiles": {**TILES, "split": "yes"}})),
    ],
)  # fmt: skip
def test_other_files_are_refused_in_a_line(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x.json is no file of `jaxquant tune` \(.*\); write it again") as caught:
        read_tiles(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


def test_a_good_file_of_a_gpu_is_read(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(GOOD))
    assert read_tiles(tmp_path / "x.json") == TunedTiles("h100", ((W4, 1, GpuTiles(8, 128, 64, 4)),))
    assert TpuTiles(8, 128, 128) != GpuTiles(8, 128, 128, 4)


@pytest.mark.parametrize(
    ("platform", "kind", "chip"),
    [
        ("tpu", "TPU v5 lite", "v5e"), ("tpu", "TPU v5", "v5p"), ("tpu", "TPU v6 lite", "v6e"),
        ("tpu", "TPU v4", "v4"), ("tpu", "TPU7x", "tpu7x"), ("tpu", "TPU v3", None),
        ("gpu", "NVIDIA A100-SXM4-40GB", None), ("cpu", "cpu", None),
    ],
)  # fmt: skip
def test_devices_are_known_by_their_kind(platform, kind, chip):
    device = SimpleNamespace(platform=platform, device_kind=kind)
    if chip is None:
        with pytest.raises(ValueError, match=f"tune times kernels on a TPU or an NVIDIA H100 or H200, .*'{kind}'"):
            tune.chip_of(device)
    else:
        assert tune.chip_of(device) == chip


def test_a_gpu_of_an_older_jax_has_no_kernels(monkeypatch):
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    monkeypatch.setattr(tune, "OLDEST_JAX", (0, 1))
    assert tune.chip_of(device) == "h200"
    monkeypatch.setattr(tune, "OLDEST_JAX", (99, 1))
    with pytest.raises(ValueError, match=r"has no kernels for GPUs; tune with 99\.1"):
        tune.chip_of(device)


def test_the_command(tmp_path, monkeypatch, capsys):
    out = tmp_path / "tiles.json"
    assert cli.main(["tune", "--out", str(out)]) == 1
    assert capsys.readouterr().err == (
        "jaxquant: error: tune times kernels on a TPU or an NVIDIA H100 or H200, and this is 'cpu'; run it there\n"
    )
    assert not out.exists()
    monkeypatch.setattr(tune, "chip_of", lambda device: "v5e")
    monkeypatch.setattr(tune, "seconds", lambda implementation, x, q: clock((512, 512))(x, q))
    assert cli.main(["tune", "--shapes", "512x1024", "--tokens", "1", "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["chip"], told["rows"]) == ("v5e", 2)
    assert [m for _, m, _ in read_tiles(out).rows] == [1, 1]
    with pytest.raises(SystemExit):
        cli.main(["tune", "--shapes", "512"])
    assert "'512' is no shape; write for example 4096x14336" in capsys.readouterr().err


def test_the_clock_runs_the_implementation_that_it_names():
    q = jq.quantize(jnp.ones((64, 32)), jq.int8())
    assert 0 < tune.seconds("reference", jnp.ones((2, 64)), q) < 10


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    assert cli.main(["tune", "--out", str(tmp_path / "no" / "tiles.json")]) == 1
    assert f"{tmp_path / 'no'} does not exist; create it before writing tiles.json" in capsys.readouterr().err
