# SPDX-License-Identifier: Apache-2.0
"""T5X's checkpoints: what T5X saved is read bit for bit, what we save is T5X's."""

import gzip
import http.server
import json
import os
import pathlib
import random
import shutil
import threading
import urllib.parse
from typing import ClassVar

import flax.serialization
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from prompt_tuning import trees
from prompt_tuning.checkpoints import t5x_native, t5x_orbax
from prompt_tuning.checkpoints.keys import t5x
from prompt_tuning.checkpoints.source import Source
from prompt_tuning.errors import UserError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
PROMPT = "encoder/prompt/prompt/prompt"
SAVED_BY_T5X = [  # checkpoint, reader, golden values, step
    ("t5x_native/t5_1_1", t5x_native, "t5_1_1/adafactor_step2.npz", 2),
    ("t5x_native/t5_1_0", t5x_native, "t5_1_0/adafactor_step2.npz", 2),
    ("t5x_native/prompt", t5x_native, "t5_1_1/params.npz", 3),
    ("t5x_native_bf16/t5_1_1", t5x_native, "t5_1_1/adafactor_step2.npz", 2),
    ("t5x_native_bf16/t5_1_0", t5x_native, "t5_1_0/adafactor_step2.npz", 2),
    ("t5x_orbax/t5_1_1", t5x_orbax, "t5_1_1/adafactor_step2.npz", 2),
    ("t5x_orbax/t5_1_0", t5x_orbax, "t5_1_0/adafactor_step2.npz", 2),
]


def small_tensors() -> dict[str, np.ndarray]:
    """A T5 of two encoder layers, as far as this module cares, and a prompt."""
    shapes = {"token_embedder/embedding": (12, 4), PROMPT: (3, 4)}
    for layer in range(2):
        shapes[f"encoder/layers_{layer}/mlp/wi_0/kernel"] = (4, 6)
        shapes[f"encoder/layers_{layer}/pre_mlp_layer_norm/scale"] = (4,)
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in sorted(shapes.items())
    }


def as_source(tensors) -> Source:
    specs = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in tensors.items()}
    prompts = {name: specs.pop(name) for name in list(specs) if name == PROMPT}
    return Source("made", "native", specs, tensors.__getitem__, prompts=prompts)


@pytest.fixture
def small(tmp_path) -> pathlib.Path:
    """A native checkpoint of `small_tensors` at step 7."""
    t5x_native.write_checkpoint(str(tmp_path), as_source(small_tensors()), step=7)
    return tmp_path / "checkpoint_7"


def read_all(source) -> dict[str, np.ndarray]:
    arrays = {name: source.read(name) for name in (*source.specs, *source.prompts)}
    for name, spec in {**source.specs, **source.prompts}.items():
        assert (arrays[name].shape, arrays[name].dtype) == (spec.shape, spec.dtype)
    return arrays


def assert_same(arrays, wanted):
    assert arrays.keys() == wanted.keys()
    for name, array in wanted.items():
        assert arrays[name].dtype == array.dtype, name
        assert arrays[name].shape == array.shape, name
        assert arrays[name].tobytes() == array.tobytes(), name


def read_index(folder) -> dict:
    return flax.serialization.msgpack_restore((folder / "checkpoint").read_bytes())


def write_index(folder, index) -> None:
    encoded = flax.serialization.msgpack_serialize(index, in_place=True)
    (folder / "checkpoint").write_bytes(encoded)


def edit_leaves(folder, edit) -> None:
    """Replaces every leaf of the parameters by ``edit(name, leaf)``."""
    index = read_index(folder)
    flat = t5x.flatten(index["optimizer"]["target"])
    flat = {name: edit(name, leaf) for name, leaf in flat.items()}
    index["optimizer"]["target"] = trees.unflatten(flat)
    write_index(folder, index)


def writable_copy(folder, target) -> pathlib.Path:
    shutil.copytree(folder, target)
    for path in (target, *target.rglob("*")):
        path.chmod(0o755)
    return target


def refused(match, function, *arguments):
    with pytest.raises(UserError, match=match) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)


def refused_open_or_read(match, folder, reader=t5x_native):
    refused(match, lambda: read_all(reader.open_checkpoint(str(folder))))


# What T5X saved.


@pytest.mark.parametrize(
    ("name", "reader", "values", "step"), SAVED_BY_T5X, ids=[s[0] for s in SAVED_BY_T5X]
)
def test_what_t5x_saved_is_read_bit_for_bit(
    t5x_checkpoints, golden, name, reader, values, step
):
    folder = str(t5x_checkpoints / name)
    readers = {t5x_native, t5x_orbax}
    assert {module for module in readers if module.is_checkpoint(folder)} == {reader}
    source = reader.open_checkpoint(folder)
    assert source.path == f"{folder}/checkpoint_{step}"
    assert source.format == ("t5x" if reader is t5x_native else "t5x-orbax")
    assert (source.metadata, source.unknown) == ({"step": step}, ())
    wanted = {
        key.removeprefix("target/"): value
        for key, value in np.load(golden / values).items()
        if not key.startswith("state/")
    }
    if "bf16" in name:
        wanted = {key: value.astype(BFLOAT16) for key, value in wanted.items()}
    if "prompt" in name:
        wanted[PROMPT] = np.load(golden / "prompt" / "prompt_after_step3.npy")
    assert set(source.prompts) == {PROMPT} & wanted.keys()
    assert_same(read_all(source), wanted)


def test_inline_tensors_and_arrays_in_pieces(shared):
    """The anchor was saved by an older T5X: driver gfile, small tensors in the index."""
    folder = shared / "checkpoints" / "anchor_tiny_t5_1_1" / "checkpoint_3"
    source = t5x_native.open_checkpoint(str(folder))
    arrays = read_all(source)
    assert len(arrays) == 52
    leaves = t5x.flatten(read_index(folder)["optimizer"]["target"])
    inline = {name: leaf for name, leaf in leaves.items() if not isinstance(leaf, dict)}
    assert len(inline) == 14
    for name, leaf in inline.items():
        assert arrays[name].tobytes() == leaf.tobytes()
    pieces = sorted((folder / "target.token_embedder.embedding").glob("*.0"))
    rows = [np.frombuffer(gzip.decompress(p.read_bytes()), "<f4") for p in pieces]
    assert len(rows) == 8
    np.testing.assert_array_equal(
        arrays["token_embedder/embedding"],
        np.concatenate(rows).reshape(-1, 4)[:32128],
    )


@pytest.mark.parametrize("name", ["t5x_native/t5_1_1", "t5x_native/prompt"])
def test_what_we_write_is_what_t5x_writes(t5x_checkpoints, tmp_path, name):
    source = t5x_native.open_checkpoint(str(t5x_checkpoints / name))
    step = source.metadata["step"]
    t5x_native.write_checkpoint(str(tmp_path), source, step=step)
    ours, theirs = tmp_path / f"checkpoint_{step}", pathlib.Path(source.path)
    # Byte for byte but for optimizer states: names, their order, shapes, dtypes, paths
    # and every other field.
    index = read_index(theirs)
    del index["optimizer"]["state"]["param_states"]
    assert (ours / "checkpoint").read_bytes() == flax.serialization.msgpack_serialize(
        index, in_place=True
    )
    for folder in theirs.glob("target.*"):
        for file in folder.iterdir():
            data = (ours / folder.name / file.name).read_bytes()
            if file.name == ".zarray":
                assert data == file.read_bytes()
            else:
                assert gzip.decompress(data) == gzip.decompress(file.read_bytes())
    targets = {path.name for path in theirs.glob("target.*")}
    assert {path.name for path in ours.iterdir()} == {"checkpoint", *targets}


def test_bfloat16_is_written_as_t5x_does(t5x_checkpoints, tmp_path):
    source = t5x_native.open_checkpoint(str(t5x_checkpoints / "t5x_native" / "t5_1_1"))
    t5x_native.write_checkpoint(str(tmp_path), source, step=2, dtype="bfloat16")
    theirs = t5x_checkpoints / "t5x_native_bf16" / "t5_1_1" / "checkpoint_2"
    ours = tmp_path / "checkpoint_2"
    assert (
        read_index(ours)["optimizer"]["target"]
        == read_index(theirs)["optimizer"]["target"]
    )
    assert_same(
        read_all(t5x_native.open_checkpoint(str(ours))),
        read_all(t5x_native.open_checkpoint(str(theirs))),
    )


# Writing and reading back.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(tmp_path, dtype):
    tensors = {name: a.astype(dtype) for name, a in small_tensors().items()}
    written = []
    t5x_native.write_checkpoint(
        str(tmp_path / "new"), as_source(tensors), step=11, progress=written.append
    )
    source = t5x_native.open_checkpoint(str(tmp_path / "new"))
    assert_same(read_all(source), tensors)
    assert source.metadata == {"step": 11}
    assert set(source.prompts) == {PROMPT}
    assert sorted(written) == sorted(tensors)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["checkpoint_11"]


def test_the_network_is_rounded_and_the_prompt_is_not(tmp_path):
    tensors = small_tensors()
    t5x_native.write_checkpoint(str(tmp_path), as_source(tensors), dtype="bfloat16")
    wanted = {
        name: array if name == PROMPT else array.astype(BFLOAT16)
        for name, array in tensors.items()
    }
    assert_same(read_all(t5x_native.open_checkpoint(str(tmp_path))), wanted)


def test_large_arrays_are_cut_into_equal_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(t5x, "CHUNK_BYTES", 64)
    tensors = small_tensors()
    t5x_native.write_checkpoint(str(tmp_path), as_source(tensors))
    folder = tmp_path / "checkpoint_0"
    leaf = read_index(folder)["optimizer"]["target"]["token_embedder"]["embedding"]
    assert leaf["metadata"]["chunks"] == [4, 4]
    pieces = (folder / "target.token_embedder.embedding").glob("[0-9]*")
    assert sorted(path.name for path in pieces) == ["0.0", "1.0", "2.0"]
    assert_same(read_all(t5x_native.open_checkpoint(str(folder))), tensors)


def test_the_last_checkpoint_of_a_folder_is_taken(small):
    parent = small.parent
    shutil.copytree(small, parent / "checkpoint_10")
    shutil.copytree(small, parent / "checkpoint_20.tmp-1700000000")
    source = t5x_native.open_checkpoint(f"{parent}/")
    assert source.path == str(parent / "checkpoint_10")
    assert t5x_native.open_checkpoint(str(small)).path == str(small)
    # A step without index is not passed over: an older one would be loaded silently.
    (parent / "checkpoint_30").mkdir()
    assert not t5x_native.is_checkpoint(str(parent))
    refused("checkpoint_30 has no", t5x_native.open_checkpoint, str(parent))


def test_other_paths_are_no_checkpoints(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file", "google/t5-v1_1-small"):
        for reader in (t5x_native, t5x_orbax):
            assert not reader.is_checkpoint(str(path))
            refused("has no T5X checkpoint", reader.open_checkpoint, str(path))


def test_an_existing_checkpoint_is_not_replaced(small):
    before = (small / "checkpoint").stat().st_mtime_ns
    refused(
        "is there already",
        lambda: t5x_native.write_checkpoint(
            str(small.parent), as_source(small_tensors()), step=7
        ),
    )
    assert (small / "checkpoint").stat().st_mtime_ns == before


@pytest.mark.parametrize("error", [UserError("damaged"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing(tmp_path, error):
    tensors = small_tensors()

    def read(name):
        if name == PROMPT:
            raise error
        return tensors[name]

    source = Source("x", "native", {n: None for n in tensors}, read)
    with pytest.raises(type(error)):
        t5x_native.write_checkpoint(str(tmp_path), source)
    assert not list(tmp_path.iterdir())


def test_bad_arguments_of_writing(tmp_path):
    source = as_source({"token_embedder/embedding": np.ones((2, 2), np.float16)})
    write = t5x_native.write_checkpoint
    refused("embedding is float16", write, str(tmp_path), source)
    refused("'float16' is not", lambda: write(str(tmp_path), source, dtype="float16"))
    (tmp_path / "file").touch()
    source = as_source(small_tensors())
    refused("cannot write", write, str(tmp_path / "file"), source)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Indices as T5X wrote them in other places and at other times.


def elsewhere(name, leaf):
    """As on a bucket that is not there."""
    path = {"path": leaf["kvstore"]["path"]}
    return leaf | {"kvstore": {"driver": "gcs", "bucket": "gone", **path}}


def within_google(name, leaf):
    """Driver of Google's own file system, and zarr's name of the dtype."""
    leaf = dict(leaf)
    names = {"float32": "<f4", "bfloat16": "bfloat16"}
    dtype = {"dtype": names[leaf.pop("dtype")]}
    path = {"path": leaf["kvstore"]["path"].rstrip("/")}
    return leaf | {
        "kvstore": {"driver": "gfile", **path},
        "metadata": leaf["metadata"] | dtype,
    }


def before_0_1_14(name, leaf):
    """The path outside of the kvstore, and a transform."""
    ends = [[size] for size in leaf["metadata"]["shape"]]
    return leaf | {
        "kvstore": {"driver": "gcs", "bucket": "t5x-dummy-bucket"},
        "path": leaf["kvstore"]["path"],
        "transform": {
            "input_inclusive_min": [0] * len(ends),
            "input_exclusive_max": ends,
        },
    }


def other_pieces(name, leaf):
    """T5X does not hold the array to these fields, either."""
    shape = leaf["metadata"]["shape"]
    other = {"chunks": [1] * len(shape), "compressor": {"id": "zlib", "level": 3}}
    return leaf | {"metadata": leaf["metadata"] | other}


def no_metadata(name, leaf):
    """Only the array itself says what it is."""
    return {"driver": leaf["driver"], "kvstore": leaf["kvstore"]}


VARIANTS = [elsewhere, within_google, before_0_1_14, other_pieces, no_metadata]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_descriptions_are_made_to_fit_where_the_checkpoint_lies(
    tmp_path, variant, dtype
):
    tensors = {name: a.astype(dtype) for name, a in small_tensors().items()}
    t5x_native.write_checkpoint(str(tmp_path / "a"), as_source(tensors))
    folder = shutil.move(tmp_path / "a" / "checkpoint_0", tmp_path / "moved")
    edit_leaves(folder, variant)
    assert_same(read_all(t5x_native.open_checkpoint(str(folder))), tensors)


def test_what_t5x_saved_is_read_after_a_move_to_a_bucket_and_back(
    t5x_checkpoints, tmp_path
):
    folder = t5x_checkpoints / "t5x_native_bf16" / "t5_1_1" / "checkpoint_2"
    copy = writable_copy(folder, tmp_path / "copy")
    edit_leaves(copy, elsewhere)
    assert_same(
        read_all(t5x_native.open_checkpoint(str(copy))),
        read_all(t5x_native.open_checkpoint(str(folder))),
    )


@pytest.mark.parametrize("variant", [None, within_google])
def test_metadata_in_the_index_only(small, variant):
    for path in small.rglob(".zarray"):
        path.unlink()
    if variant is not None:
        edit_leaves(small, variant)
    assert_same(read_all(t5x_native.open_checkpoint(str(small))), small_tensors())
    edit_leaves(small, no_metadata)
    refused_open_or_read(r"\.zarray.* does not exist", small)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_inside_of_the_index(small, dtype):
    """As one array each, and in the parts that Flax makes of huge arrays."""
    tensors = {name: a.astype(dtype) for name, a in small_tensors().items()}

    def inline(name, leaf):
        array = tensors[name]
        if array.ndim == 1:
            return array
        return {
            "__msgpack_chunked_array__": True,
            "shape": {"0": array.shape[0], "1": array.shape[1]},
            "chunks": {"0": array.reshape(-1)[:5], "1": array.reshape(-1)[5:]},
        }

    edit_leaves(small, inline)
    for folder in small.glob("target.*"):
        shutil.rmtree(folder)
    assert_same(read_all(t5x_native.open_checkpoint(str(small))), tensors)


def test_an_index_without_version(small):
    index = read_index(small)
    write_index(small, index["optimizer"])
    assert_same(read_all(t5x_native.open_checkpoint(str(small))), small_tensors())


def test_leftovers_are_listed_and_optimizer_states_are_not(small):
    index = read_index(small)
    states = {"encoder": {"m": np.zeros(3, np.float32), "v": None}}
    index["optimizer"]["state"]["param_states"] = states
    index["optimizer"]["target"]["encoder"]["adapter"] = np.zeros(3, np.float32)
    index["optimizer"]["flax_mutables"] = {"cache": np.zeros(3, np.float32)}
    write_index(small, index)
    source = t5x_native.open_checkpoint(str(small))
    assert sorted(source.unknown) == ["flax_mutables/cache", "target/encoder/adapter"]
    assert_same(read_all(source), small_tensors())
    refused("holds no encoder/adapter", source.read, "encoder/adapter")


# Damage.


def with_leaf(change):
    """Damages the description of the embedding."""

    def damage(folder):
        edit_leaves(
            folder, lambda name, leaf: change(leaf) if "embedding" in name else leaf
        )

    return damage


def with_file(name, change):
    def damage(folder):
        change(folder / name)

    return damage


def at_path(path):
    return with_leaf(lambda leaf: leaf | {"kvstore": {"driver": "file", "path": path}})


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def link_out(path):
    """Moves a file or folder of a checkpoint out of it and leaves a link."""
    folder = next(p for p in path.parents if p.name.startswith("checkpoint_"))
    outside = folder.with_name("outside")
    shutil.move(path, outside)
    path.symlink_to(outside)


EMBEDDING = "target.token_embedder.embedding"
DAMAGES = {
    "index cut short": (with_file("checkpoint", halve), "checkpoint: Unpack failed"),
    "index of TensorFlow": (
        with_file("checkpoint", lambda p: p.write_bytes(b'model_checkpoint_path: "x"')),
        "convert it with T5X",
    ),
    "index is no tree": (
        with_file("checkpoint", lambda p: p.write_bytes(b"\x01")),
        "no tree of tensors",
    ),
    "version of the future": (
        lambda folder: write_index(folder, read_index(folder) | {"version": 4}),
        "version is 4, not 3",
    ),
    "no tensors": (
        lambda folder: write_index(folder, {"version": 3, "optimizer": {}}),
        "no tensor of a T5",
    ),
    "array missing": (with_file(EMBEDDING, shutil.rmtree), "embedding.* is missing"),
    "chunk missing": (with_file(f"{EMBEDDING}/0.0", os.remove), r"0\.0.* is missing"),
    "chunk cut short": (with_file(f"{EMBEDDING}/0.0", halve), "embedding.*Not enough"),
    "chunk flipped": (with_file(f"{EMBEDDING}/0.0", flip), "embedding: Error reading"),
    "metadata cut short": (with_file(f"{EMBEDDING}/.zarray", halve), "Invalid JSON"),
    "path above": (at_path("../other/"), r"'\.\./other/' is outside"),
    "path above, hidden": (at_path("a/../../b/"), "is outside"),
    "absolute path": (at_path("/etc/"), "'/etc/' is outside"),
    "no path": (at_path(""), "lacks 'path'"),
    "array of another tensor": (
        at_path("target.encoder.layers_0.mlp.wi_0.kernel/"),
        "its array is that of",
    ),
    "folder linked": (with_file(EMBEDDING, link_out), "is a link out of"),
    "chunk linked": (with_file(f"{EMBEDDING}/0.0", link_out), "is a link out of"),
    "index linked": (with_file("checkpoint", link_out), "checkpoint is a link out of"),
    "other driver": (with_leaf(lambda leaf: leaf | {"driver": "n5"}), "n5 and file"),
    "other store": (
        with_leaf(lambda leaf: leaf | {"kvstore": {"driver": "http", "path": "x"}}),
        "zarr and http",
    ),
    "other shape": (
        with_leaf(
            lambda leaf: leaf | {"metadata": leaf["metadata"] | {"shape": [4, 12]}}
        ),
        r"Expected \"shape\" of \[4,12\]",
    ),
    "other dtype": (with_leaf(lambda leaf: leaf | {"dtype": "bfloat16"}), "dtype"),
    "integers": (with_leaf(lambda leaf: np.zeros((12, 4), np.int32)), "it is int32"),
    "no array": (with_leaf(lambda leaf: None), "embedding"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_in_one_line(small, damage):
    change, match = DAMAGES[damage]
    change(small)
    refused_open_or_read(match, small)


def test_mutated_indices_load_the_same_or_are_refused(small):
    rng = random.Random(0)
    whole, wanted = (small / "checkpoint").read_bytes(), small_tensors()
    refusals = 0
    for _ in range(150):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (small / "checkpoint").write_bytes(data)
        try:
            source = t5x_native.open_checkpoint(str(small))
            found = read_all(source)
        except UserError as error:
            assert "\n" not in str(error)
            refusals += 1
            continue
        # What has lost its name is missing to the one who loads it.
        for name in found.keys() & wanted.keys():
            assert found[name].tobytes() == wanted[name].tobytes()
        assert len(source.unknown) >= len(wanted) - len(found)
    assert refusals > 75


# Orbax.


@pytest.fixture(params=["database", "folders", "placeholders", "flat"])
def by_orbax(request, tmp_path) -> pathlib.Path:
    """`small_tensors` at step 7 in the layouts that T5X's checkpoints by orbax had."""
    folder = tmp_path / "checkpoint_7"
    state = folder if request.param == "flat" else folder / "state"
    tree = {
        "target": trees.unflatten(small_tensors()),
        "state": {"step": np.asarray(7, np.int32), "param_states": {"m": np.ones(3)}},
    }
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=request.param == "database")
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(state, args=ocp.args.PyTreeSave(tree))
    assert (state / "manifest.ocdbt").exists() == (request.param == "database")
    names = {n: f"PLACEHOLDER://{n.replace('/', '.')}" for n in trees.flatten(tree)}
    if request.param == "placeholders":
        (state / "_METADATA").unlink()
        write_index(state, trees.unflatten(names))
    if request.param == "flat":
        # Both files, with a value in the older one.
        write_index(state, trees.unflatten(names | {"state/step": 7}))
        metadata = json.loads((state / "_METADATA").read_text())
        step = metadata["tree_metadata"]["('state', 'step')"]
        step["value_metadata"]["skip_deserialize"] = True
        (state / "_METADATA").write_text(json.dumps(metadata))
        shutil.rmtree(state / "state.step")
    return folder


def test_layouts_of_orbax(by_orbax):
    assert t5x_orbax.is_checkpoint(str(by_orbax.parent))
    assert not t5x_native.is_checkpoint(str(by_orbax.parent))
    source = t5x_orbax.open_checkpoint(str(by_orbax.parent))
    assert (source.path, source.format) == (str(by_orbax), "t5x-orbax")
    assert (source.metadata, source.unknown) == ({"step": 7}, ())
    assert set(source.prompts) == {PROMPT}
    assert_same(read_all(source), small_tensors())


def test_checkpoints_of_orbax_that_lack_something(by_orbax):
    for path in sorted(by_orbax.rglob("*")):
        if path.name not in (".zarray", "0.0", "0", "d"):
            continue
        shutil.move(path, by_orbax.with_name("aside"))
        if "param_states" in path.parent.name:
            read_all(t5x_orbax.open_checkpoint(str(by_orbax)))
        elif path.parent.name != "ocdbt.process_0":
            refused_open_or_read("cannot read", by_orbax, t5x_orbax)
        shutil.move(by_orbax.with_name("aside"), path)
    read_all(t5x_orbax.open_checkpoint(str(by_orbax)))


def test_damaged_checkpoints_of_orbax(by_orbax):
    names = ("_METADATA", "checkpoint", "manifest.ocdbt")
    for path in [path for name in names for path in by_orbax.rglob(name)]:
        if path.parent.name == "ocdbt.process_0":
            continue
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        refused_open_or_read("cannot read", by_orbax, t5x_orbax)
        path.write_bytes(data)
    link_out(next(by_orbax.rglob("_METADATA"), by_orbax / "state" / "checkpoint"))
    refused_open_or_read("is a link out of", by_orbax, t5x_orbax)


def test_placeholders_outside_of_the_folder(tmp_path):
    (tmp_path / "state").mkdir()
    name = "target/token_embedder/embedding"
    write_index(tmp_path / "state", trees.unflatten({name: "PLACEHOLDER://../a"}))
    refused_open_or_read("'../a' is outside", tmp_path, t5x_orbax)


# Google Cloud Storage.


class FakeStorage(http.server.BaseHTTPRequestHandler):
    """The four requests of Google Cloud Storage that tensorstore makes."""

    protocol_version = "HTTP/1.1"
    objects: ClassVar[dict[str, bytes]] = {}

    def log_message(self, *_):
        """Keeps the output of the tests clean."""

    def answer(self, code: int, body: bytes = b"") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("x-goog-generation", "1")
        self.end_headers()
        self.wfile.write(body)

    def parsed(self) -> tuple[str, dict[str, str]]:
        """Bucket and name of the object, and the query."""
        url = urllib.parse.urlparse(self.path)
        bucket, _, name = url.path.partition("/b/")[2].partition("/o")
        query = dict(urllib.parse.parse_qsl(url.query))
        name = urllib.parse.unquote(name.removeprefix("/")) or query.get("name", "")
        return f"{bucket}/{name}", query

    def do_GET(self):
        name, query = self.parsed()
        if name.startswith("private/"):
            self.answer(403)
        elif "alt" in query:
            found = self.objects.get(name)
            self.answer(404 if found is None else 200, found or b"")
        else:
            first = name + query.get("startOffset", "")
            end = name + query.get("endOffset", "\U0010ffff")
            items = [
                {"name": key.removeprefix(name)}
                for key in sorted(self.objects)
                if first <= key < end
            ]
            self.answer(200, json.dumps({"items": items}).encode())

    def do_POST(self):
        name, _ = self.parsed()
        self.objects[name] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, json.dumps({"name": name, "generation": "1"}).encode())

    def do_DELETE(self):
        self.objects.pop(self.parsed()[0], None)
        self.answer(204)


@pytest.fixture(scope="module")
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeStorage)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def bucket(server, monkeypatch) -> dict[str, bytes]:
    """Contents of a Google Cloud Storage on this machine, empty at first."""
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "anyone")
    FakeStorage.objects.clear()
    return FakeStorage.objects


def upload(bucket, folder, name) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            bucket[f"{name}/{path.relative_to(folder)}"] = path.read_bytes()


def test_reading_from_a_bucket(bucket, small):
    upload(bucket, small, "ours/models/t5/checkpoint_7")
    upload(bucket, small, "ours/models/t5/checkpoint_10")
    bucket["ours/models/t5/checkpoint_10/train_ds-000-of-001.index"] = b""
    upload(bucket, small, "ours/any_name")
    for path, wanted in {
        "gs://ours/models/t5": "gs://ours/models/t5/checkpoint_10",
        "gs://ours/models/t5/checkpoint_7/": "gs://ours/models/t5/checkpoint_7",
        "gs://ours/any_name": "gs://ours/any_name",
    }.items():
        assert t5x_native.is_checkpoint(path)
        assert not t5x_orbax.is_checkpoint(path)
        source = t5x_native.open_checkpoint(path)
        assert source.path == wanted
        assert_same(read_all(source), small_tensors())
    assert not t5x_native.is_checkpoint("gs://ours/models")
    refused("no T5X checkpoint", t5x_native.open_checkpoint, "gs://ours/models")
    del bucket[f"ours/any_name/{EMBEDDING}/0.0"]
    refused_open_or_read(r"0\.0.* is missing; .*gcloud auth", "gs://ours/any_name")


def test_reading_what_orbax_saved_from_a_bucket(bucket, by_orbax):
    upload(bucket, by_orbax, "ours/t5/checkpoint_7")
    assert t5x_orbax.is_checkpoint("gs://ours/t5")
    source = t5x_orbax.open_checkpoint("gs://ours/t5")
    assert source.path == "gs://ours/t5/checkpoint_7"
    assert_same(read_all(source), small_tensors())


def test_a_bucket_of_somebody_else(bucket):
    refused("gcloud auth", t5x_native.is_checkpoint, "gs://private/t5")


def test_writing_to_a_bucket(bucket, tmp_path):
    tensors = small_tensors()
    t5x_native.write_checkpoint("gs://ours/new", as_source(tensors), step=3)
    # The index makes the checkpoint, so it has to come last.
    assert list(bucket)[-1] == "ours/new/checkpoint_3/checkpoint"
    index = flax.serialization.msgpack_restore(list(bucket.values())[-1])
    leaf = index["optimizer"]["target"]["token_embedder"]["embedding"]
    assert leaf["kvstore"] == {
        "bucket": "t5x-dummy-bucket",
        "driver": "gcs",
        "path": "target.token_embedder.embedding/",
    }
    assert_same(read_all(t5x_native.open_checkpoint("gs://ours/new")), tensors)
    refused(
        "is there already",
        lambda: t5x_native.write_checkpoint(
            "gs://ours/new", as_source(tensors), step=3
        ),
    )
    for name, data in bucket.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    downloaded = t5x_native.open_checkpoint(str(tmp_path / "ours" / "new"))
    assert_same(read_all(downloaded), tensors)


def test_a_failed_upload_leaves_nothing(bucket):
    tensors = small_tensors()
    bucket["ours/new/checkpoint_2/checkpoint"] = b"another"

    def read(name):
        if name == PROMPT:
            raise UserError("damaged")
        return tensors[name]

    source = Source("x", "native", dict.fromkeys(reversed(tensors)), read)
    with pytest.raises(UserError, match="damaged"):
        t5x_native.write_checkpoint("gs://ours/new", source)
    assert list(bucket) == ["ours/new/checkpoint_2/checkpoint"]
