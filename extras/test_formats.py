"""Tests of formats.py, vae.py, latents.py and encoders.py."""
import dataclasses
import gzip
import io
import json
import math
import os
import pickle
import shutil
import struct
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
import fid
import model
import sample
import train
from extras import encoders, formats, guidance, latents, vae
from test_all import SMALL_SET, check_golden, error_of, golden_weights, raises, run, same, tiny_run, wave

SMALL_ENCODER = f"{SMALL_SET.with_name('encoder.py')}:patches"  # (17, 12): of the colours of patches
SMALL_SET.with_name("encoder.py").write_text("""
import torch
def patches(images):
    colours = torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(2).transpose(1, 2)
    colours = torch.cat([colours.mean(1, keepdim=True), colours], 1)
    weights = 7 * torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    return torch.sin(colours @ weights.to(images))
def image(images):
    return images
""")


# ------------------------------------------------------------------------------------------------------------
# formats.py
# ------------------------------------------------------------------------------------------------------------


def random_images() -> tuple[np.ndarray, list[int]]:
    """Six images (6, 32, 32, 3) of three classes."""
    images = torch.randint(0, 256, (6, 32, 32, 3), generator=torch.Generator().manual_seed(0))
    return images.byte().numpy(), [2, 0, 1, 1, 0, 2]


def write_zip(path, images, **members) -> None:
    """An EDM zip of these images, and further members by name."""
    with zipfile.ZipFile(path, "w") as archive:
        for i, image in enumerate(images):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "png")
            archive.writestr(f"00000/img{i}.png", buffer.getvalue())
        for name, content in members.items():
            archive.writestr(name, content)


def edm_labels(labels) -> str:
    return json.dumps({"labels": [[f"00000/img{i}.png", k] for i, k in enumerate(labels)]})


def idx_pair(grey, labels) -> dict[str, bytes]:
    return {"images-idx3-ubyte": struct.pack(">4i", 0x803, *grey.shape) + grey.tobytes(),
            "labels-idx1-ubyte": struct.pack(">2i", 0x801, len(labels)) + bytes(labels)}


def test_formats_hold_the_same_images_and_labels(tmp_path):
    """An EDM zip, also by workers, and CIFAR-10's binary files, one or a folder, give what was written."""
    images, labels = random_images()
    write_zip(tmp_path / "edm.zip", images, **{"dataset.json": edm_labels(labels)})
    records = [bytes([k]) + image.transpose(2, 0, 1).tobytes() for image, k in zip(images, labels)]
    (tmp_path / "test_batch.bin").write_bytes(b"".join(records))
    (tmp_path / "cifar").mkdir()
    parts = dict(data_batch_1=records[:2], data_batch_2=records[2:], test_batch=records[:1])
    for name, part in parts.items():
        (tmp_path / f"cifar/{name}.bin").write_bytes(b"".join(part))
    for name in ("edm.zip", "test_batch.bin", "cifar"):
        ds = data.dataset(str(tmp_path / name))
        x, y = next(data.batches(ds, [list(range(6))], workers=2 if name == "edm.zip" else 0))
        assert torch.equal(x, torch.from_numpy(images).permute(0, 3, 1, 2)), name
        assert y.tolist() == labels and ds.num_classes == (3 if "zip" in name else 10), name
        assert ds.mirror and len(ds) == 6, name
    assert ds.classes[0] == "airplane"
    assert data.dataset(str(tmp_path / "cifar"), 16).item(0)[0].shape == (3, 16, 16)
    ds = data.dataset(str(tmp_path / "edm.zip"), 16)
    ds.item(1)  # opens the archive, which must not travel to a worker process
    assert same(pickle.loads(pickle.dumps(ds)).item(1), ds.item(1)) and ds.item(1)[0].shape == (3, 16, 16)
    here, ds.owner = ds.archive, -1
    assert ds.item(1) and ds.archive is not here  # another process opens its own
    write_zip(tmp_path / "bare.zip", images)
    assert data.dataset(str(tmp_path / "bare.zip")).classes == ["0"]


def test_formats_mnist(tmp_path):
    """MNIST's idx files, raw and gzipped, by name or, of a folder, train's: grey becomes three channels."""
    images, labels = random_images()
    grey = images[:, :28, :28, 0].copy()
    train, test = idx_pair(grey, labels), idx_pair(grey[:1], labels[:1])
    for folder, end in (("gz", ".gz"), ("raw", "")):
        (tmp_path / folder).mkdir()
        for (name, content), other in zip(train.items(), test.values()):
            pack = gzip.compress if end else bytes
            (tmp_path / folder / f"train-{name}{end}").write_bytes(pack(content))
            (tmp_path / folder / f"t10k-{name}{end}").write_bytes(pack(other))
    deep, dots = tmp_path / "deep/MNIST/raw", tmp_path / "dots"  # torchvision's; another archive's
    shutil.copytree(tmp_path / "gz", deep)
    shutil.copytree(tmp_path / "raw", deep, dirs_exist_ok=True)
    for name in train:
        file = dots / f"train-{name}" / f"train-{name.replace('-idx', '.idx')}"
        shutil.copytree(tmp_path / "raw", file.parent, ignore=lambda *_: os.listdir(tmp_path / "raw"))
        file.write_bytes(train[name])
        (dots / f"train-{name.replace('-idx', '.idx')}").write_bytes(train[name])
    for source in "raw/train-images-idx3-ubyte gz/train-images-idx3-ubyte.gz gz raw deep dots".split():
        ds = data.dataset(str(tmp_path / source))
        assert ds.shape == (3, 28, 28) and not ds.mirror and len(ds) == 6, source
        assert torch.equal(ds.item(3)[0], torch.from_numpy(grey[3]).expand(3, 28, 28)) and ds.item(3)[1] == 1
    assert len(data.dataset(str(tmp_path / "raw/t10k-images-idx3-ubyte"))) == 1
    assert data.dataset(str(tmp_path / "gz"), 32).item(0)[0].shape == (3, 32, 32)
    raises(lambda: data.dataset(str(tmp_path)), "several data sets", str(tmp_path / "gz"), "name one")
    (tmp_path / "raw/other-train-images-idx3-ubyte").write_bytes(b"")
    raises(lambda: data.dataset(str(tmp_path / "raw")), "other-train-images", "name one")


def test_formats_cifar(tmp_path):
    """CIFAR-10's binary version as an archive, its folder, the folder above, its files, packed or not."""
    images, labels = random_images()
    records = [bytes([k]) + image.transpose(2, 0, 1).tobytes() for image, k in zip(images, labels)]
    folder, packed = tmp_path / "up/cifar-10-batches-bin", tmp_path / "packed"
    for root, end, pack in ((folder, "", bytes), (packed, ".gz", gzip.compress)):
        root.mkdir(parents=True)
        parts = dict(data_batch_1=records[:2], data_batch_2=records[2:], test_batch=records[:1])
        for name, part in parts.items():
            (root / f"{name}.bin{end}").write_bytes(pack(b"".join(part)))
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        archive.add(folder, "cifar-10-batches-bin")
    for source in (folder, folder.parent, packed, tmp_path / "cifar-10-binary.tar.gz"):
        ds = data.dataset(str(source))
        assert len(ds) == 6 and list(ds.labels) == labels and ds.num_classes == 10 and ds.mirror, source
        assert torch.equal(ds.item(4)[0], torch.from_numpy(images[4]).permute(2, 0, 1)), source
    assert len(data.dataset(str(packed / "test_batch.bin.gz"))) == 1
    whole = (tmp_path / "cifar-10-binary.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[:len(whole) // 2])
    raises(lambda: data.dataset(str(tmp_path / "cut.tar.gz")), "cut.tar.gz", "not a readable archive")


def test_formats_errors_name_the_file_and_the_fix(tmp_path):
    """Broken zips, idx and CIFAR-10 files: one line that says what is wrong and where."""
    images, labels = random_images()
    grey = idx_pair(images[:, :28, :28, 0].copy(), labels)["images-idx3-ubyte"]
    write_zip(tmp_path / "list.zip", images[:1], **{"dataset.json": "[1, 2]"})
    write_zip(tmp_path / "short.zip", images, **{"dataset.json": edm_labels(labels[:4])})
    write_zip(tmp_path / "label.zip", images, **{"dataset.json": edm_labels([-1] * 6)})
    write_zip(tmp_path / "none.zip", [], **{"dataset.json": "{}"})
    write_zip(tmp_path / "damaged.zip", images)
    whole = bytearray((tmp_path / "damaged.zip").read_bytes())
    whole[200] ^= 255  # inside the first image: its checksum tells
    files = {"broken.zip": b"PK nothing", "damaged.zip": whole,
             "x.bin": bytes(3000), "y.bin": b"", "z.bin": b"\x0a" * 3073,
             "a-images-idx3-ubyte": bytes(100),
             "b-images-idx3-ubyte": bytes(3), "b-labels-idx1-ubyte": bytes(3),
             "c-images-idx3-ubyte": bytes(100), "c-labels-idx1-ubyte": bytes(100),
             "d-images-idx3-ubyte": grey[:-1], "d-labels-idx1-ubyte": bytes(9),
             "f-images-idx3-ubyte": b"\0\0\x0d\3" + grey[4:], "f-labels-idx1-ubyte": bytes(9),
             "g-images-idx3-ubyte": bytes([0, 0, 8, 3] + 12 * [0]),
             "g-labels-idx1-ubyte": bytes([0, 0, 8, 1] + 4 * [0]),
             "e-images-idx3-ubyte.gz": b"no gzip", "e-labels-idx1-ubyte.gz": b"",
             "python/data_batch_1": b"", "text.txt": b"hello"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for name, *words in [
            ("broken.zip", "broken.zip", "as EDM writes it"), ("list.zip", "dataset.json"),
            ("none.zip", "no images"), ("short.zip", "no label for 00000/img4.png (2 such"),
            ("label.zip", "label.zip: labels", "-1"),
            ("damaged.zip", "damaged.zip/00000/img0.png: cannot be read", "write it again"),
            ("x.bin", "3073"), ("y.bin", "3073"), ("z.bin", "label 10"),
            ("a-images-idx3-ubyte", "labels a-labels-idx1-ubyte are missing"),
            ("b-images-idx3-ubyte", "cut short"), ("c-images-idx3-ubyte", "cut short"),
            ("d-images-idx3-ubyte", "cut short"), ("g-images-idx3-ubyte", "cut short"),
            ("f-images-idx3-ubyte", "not an idx file of 3-dimensional bytes"),
            ("e-images-idx3-ubyte.gz", "not readable"),
            ("python", "pickled", "binary version"),
            ("text.txt", "text.txt", "zip", "idx", "cifar", "latents")]:
        raises(lambda: data.dataset(str(tmp_path / name)), *words)


def test_formats_npz_is_mapped_from_disk(tmp_path):
    """A stored array of an npz is not read into memory."""
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((5000, 32, 32, 3), np.uint8))
    tracemalloc.start()
    ds = data.dataset(str(tmp_path / "x.npz"))
    assert ds.num_classes == 1 and ds.item(4999)[0].shape == ds.shape == (3, 32, 32)
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


def test_formats_run_alone(tmp_path, capsys):
    """`python -m extras.formats` and `python data.py` show such a set; the former asks for a path."""
    images, labels = random_images()
    write_zip(tmp_path / "edm.zip", images, **{"dataset.json": edm_labels(labels)})
    formats.main([str(tmp_path / "edm.zip"), "--out", str(tmp_path / "a.png")])
    assert "6 images of shape (3, 32, 32), 3 classes, 2 to 2 images a class" in capsys.readouterr().out
    done = run("data.py", tmp_path / "edm.zip", "--out", tmp_path / "b.png")
    assert done.returncode == 0 and "6 images" in done.stdout, done.stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    raises(lambda: formats.main([]), "usage")


# ------------------------------------------------------------------------------------------------------------
# vae.py and the files of weights
# ------------------------------------------------------------------------------------------------------------


def small_vae() -> vae.VAE:
    torch.manual_seed(0)
    return vae.VAE((32, 32, 32, 32)).eval()


def write_safetensors(path, tensors: dict, **header) -> None:
    """A .safetensors file; `header` changes entries of its header."""
    entries, blobs, at = {"__metadata__": {"format": "pt"}}, [], 0
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    for name, tensor in tensors.items():
        blobs.append(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        offsets = [at, at := at + len(blobs[-1])]
        entries[name] = dict(dtype=names[tensor.dtype], shape=list(tensor.shape), data_offsets=offsets)
    for name, change in header.items():
        entries[name] = entries[name] | change
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def test_latents_safetensors(tmp_path):
    """Tensors come back bit for bit, of every type and at odd places; a header that lies is refused."""
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).half(), "c": torch.randn(2, 1, 3).bfloat16(),
               "d": torch.arange(4), "e": torch.tensor(2.5), "f": torch.empty(0, 3)}
    for padding in ("", "x", "xyz"):  # moves the data to other alignments
        write_safetensors(path, tensors, __metadata__={"note": padding})
        assert same(latents.read_safetensors(path), tensors)
    write_safetensors(path, {})
    assert latents.read_safetensors(path) == {}
    for change in (dict(dtype="F64"), dict(dtype="X1"), dict(shape=[3, 5]), dict(shape=[-3, -4]),
                   dict(shape="x"), dict(shape=[10 ** 18]), dict(data_offsets=[0, 49]),
                   dict(data_offsets=[4, 52]), dict(data_offsets=[-48, 0]),
                   dict(data_offsets=[10 ** 15, 10 ** 15 + 48]), dict(data_offsets=[48, 0]),
                   dict(data_offsets=[0])):
        write_safetensors(path, tensors, a=change)
        raises(lambda: latents.read_safetensors(path), "a.safetensors", "get it again")
    write_safetensors(path, tensors)
    whole = path.read_bytes()
    for content in (b"", b"1234", whole[:100], whole[:-1], struct.pack("<Q", 10 ** 18) + whole[8:],
                    struct.pack("<Q", 20) + b"[" * 20, struct.pack("<Q", 2) + b"[]",
                    struct.pack("<Q", 4) + b"\xff" * 4, struct.pack("<Q", 100_000) + b"[" * 100_000):
        path.write_bytes(content)
        raises(lambda: latents.read_safetensors(path), "a.safetensors", "get it again")


@torch.no_grad()
def test_vae_golden():
    """The official SD-VAE's moments and images on formula weights are met to 1e-4; 83,653,863 values."""
    with torch.device("meta"):
        net = vae.VAE()
    shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    assert len(shapes) == 248 and sum(math.prod(shape) for shape in shapes.values()) == 83_653_863
    net.load_state_dict(golden_weights(shapes), assign=True)
    at = [0, 1, 170, 256, 511]
    check_golden(net.moments(wave((1, 3, 64, 64), .0213)), .0562579562, .1794833716, at,
                 [-.1492293477, -.1553669274, -.1140723154, -.0904052705, .1435607672], 1e-4)
    at = [0, 1, 4096, 6144, 12287]
    check_golden(net.decode(wave((1, 4, 8, 8), .37) * 0.18215), -.0735035117, .5905132972, at,
                 [-.2061313540, -.1775727421, .1083270460, -.3690289557, .2613124549], 1e-4)


@torch.no_grad()
def test_vae_files(tmp_path, capsys):
    """All layouts load alike: safetensors and .bin, attention under old names and as convolutions, half
    precision; what is no such file is refused; a codec decodes a few latents at a time."""
    torch.manual_seed(0)
    net, x = vae.VAE((32, 32, 64, 64)).eval(), torch.randn(2, 3, 32, 32)
    new, want = net.state_dict(), net.moments(x)
    old = {}
    for key, value in new.items():
        for now, then in (("to_out.0", "proj_attn"), ("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
            key = key.replace(now, then)
        old[key] = value[:, :, None, None] if "attentions" in key and value.dim() == 2 else value
    for name, weights in (("new", new), ("old", old), ("half", {k: v.half() for k, v in new.items()})):
        write_safetensors(tmp_path / f"{name}.safetensors", weights)
        torch.save(weights, tmp_path / f"{name}.bin")
        for suffix in ("safetensors", "bin"):
            found = latents.load_vae(tmp_path / f"{name}.{suffix}").moments(x)
            assert torch.equal(found, want) if name != "half" else (found - want).abs().max() < 1e-2

    write_safetensors(tmp_path / "other.safetensors", {"a": torch.ones(1)})
    torch.save({k: v for k, v in new.items() if "quant" not in k}, tmp_path / "part.bin")
    torch.save(new | {"a": torch.ones(1)}, tmp_path / "more.bin")
    torch.save(new | {"quant_conv.bias": torch.ones(9)}, tmp_path / "shape.bin")
    torch.save({"state_dict": new}, tmp_path / "nested.bin")
    torch.save(list(new.values()), tmp_path / "list.bin")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "new.bin").read_bytes()[:5000])
    for name in "other.safetensors part.bin more.bin shape.bin nested.bin list.bin cut.bin".split():
        assert name in error_of(latents.load_vae, tmp_path / name)
    raises(lambda: latents.load_vae(tmp_path / "absent.pt"), "334,643,276", "a1d99348", "absent.pt", "https:")

    codec = data.codec(f"latents:{tmp_path / 'new.bin'}").to("cpu")
    z, sizes = torch.randn(9, 4, 4, 4, dtype=torch.float64), []
    codec.decoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    made = codec.decode(z)
    assert sizes == [8, 1] and made.shape == (9, 3, 32, 32) and made.dtype == torch.float32
    assert (made - torch.cat([net.decode(part) for part in z.split(1)])).abs().max() < 1e-4
    assert codec.image_shape((4, 4, 6)) == (3, 32, 48)
    assert not codec.training and not any(p.requires_grad for p in codec.parameters())
    raises(lambda: codec.image_shape((3, 8, 8)), "4 channels", "makes 3")
    vae.main()
    assert "83,653,863" in capsys.readouterr().out


def test_vae_posterior():
    """z = (mean + std noise) scale, and finite where the log-variance is out of bounds."""
    moments = torch.cat([torch.full((1, 4, 50, 50), 2.), torch.full((1, 4, 50, 50), 2 * math.log(3))], 1)
    z = vae.posterior(moments, torch.randn(1, 4, 50, 50), 0.18215) / 0.18215
    assert abs(z.mean() - 2) < .1 and abs(z.std() - 3) < .1
    assert torch.isfinite(vae.posterior(moments * 1000, torch.ones(1, 4, 50, 50), 0.18215)).all()


# ------------------------------------------------------------------------------------------------------------
# latents.py and encoders.py
# ------------------------------------------------------------------------------------------------------------


def encoding(folder, *flags) -> tuple:
    """Eleven glyphs, and flags that encode them to folder/out with vae.bin, in three shards."""
    torch.save(small_vae().state_dict(), folder / "vae.bin")
    images, labels = data.glyphs(11)
    np.savez(folder / "set.npz", images=images.numpy(), labels=labels.numpy())
    names = [str(folder / "set.npz"), str(folder / "out"), "--vae", str(folder / "vae.bin")]
    return images, labels, [*names, *"--size 32 --batch 3 --shard 4 --workers 0 --device cpu".split(), *flags]


@torch.no_grad()
def test_latents_encode(tmp_path, capsys):
    """Moments of images and of their mirror images, in shards, in the images' order; stopped, it goes on;
    training draws latents from them, one side or the other; what does not belong together is refused."""
    images, labels, flags = encoding(tmp_path)
    latents.main(flags)
    shards = sorted((tmp_path / "out").glob("moments_*.npy"))
    assert [len(np.load(p)) for p in shards] == [4, 4, 3] and not list((tmp_path / "out").glob("*.tmp*"))
    assert "11 images as latents (4, 4, 4) of 10 classes" in capsys.readouterr().out
    ds = data.dataset(str(tmp_path / "out"), 32)
    assert len(ds) == 11 and ds.shape == (4, 4, 4) and ds.num_classes == 10 and ds.mirror
    assert ds.features is None and [ds.item(i)[1] for i in range(11)] == labels.tolist()
    net = small_vae()
    for i in (0, 4, 10):
        item = ds.item(i)[0]
        assert item.shape == (2, 8, 4, 4) and item.dtype == torch.float16
        for side, image in enumerate((images[i], images[i].flip(2))):
            assert (item[side] - net.moments(data.to_float(image[None]))[0]).abs().max() < 5e-3

    (items, _, positions), = data.stream(ds, [list(range(200))], 0, mirror=True)
    moments = torch.stack([ds.item(data.index_at(11, p, 0))[0] for p in positions])
    right = (items[:, None] == moments).flatten(2).all(2)
    assert right.any(1).all() and 70 < right[:, 1].sum() < 130
    assert torch.equal(next(data.stream(ds, [positions], 0))[0], moments[:, 0])
    draws = data.Draws(0, range(200))
    mean, log_variance = items.float().chunk(2, 1)
    want = (mean + (log_variance / 2).exp() * draws.normal("posterior", (4, 4, 4))) * 0.18215
    assert (ds.clean(items, draws) - want).abs().max() < 1e-5 * want.square().mean().sqrt()

    (shards[1]).unlink()
    raises(lambda: data.dataset(str(tmp_path / "out"), 32), "moments_00001.npy is missing", "1 of 3")
    before = shards[0].stat().st_mtime_ns
    latents.main(flags)
    assert shards[1].exists() and shards[0].stat().st_mtime_ns == before
    assert torch.equal(data.dataset(str(tmp_path / "out")).item(5)[0], ds.item(5)[0])
    raises(lambda: latents.main([*flags, "--shard", "5"]), "begun with shard 4, not 5", "new folder")
    raises(lambda: latents.main([*flags, "--size", "36"]), "--size 36", "multiple of 8")
    raises(lambda: latents.main([*flags, "--batch", "0"]), "--batch 0", "expected 1 to")
    raises(lambda: latents.main([flags[1], str(tmp_path / "b"), *flags[2:]]), "out: holds latents")
    raises(lambda: latents.main([]), "usage")
    raises(lambda: data.dataset(str(tmp_path / "out"), 64), "encoded at --size 32, not 64", "--size 0")
    for text in ("{}", "[]", "no JSON"):
        (tmp_path / "out/manifest.json").write_text(text)
        raises(lambda: data.dataset(str(tmp_path / "out"), 32), "manifest.json", "extras.latents")


def test_latents_encoded_by_two_processes_are_those_of_one(tmp_path, monkeypatch):
    """Each of two processes writes every second shard, and what they write together is what one writes."""
    *_, flags = encoding(tmp_path)
    latents.main(flags)
    monkeypatch.setattr(data, "world", lambda: 2)
    written = []
    for rank in (1, 0):
        monkeypatch.setattr(data, "rank", lambda: rank)
        latents.main([flags[0], str(tmp_path / "two"), *flags[2:]])
        written.append(sorted(p.name for p in (tmp_path / "two").glob("moments*")))
        assert (tmp_path / "two/manifest.json").exists() == (rank == 0)  # one process writes it
    assert written == [["moments_00001.npy"], [f"moments_0000{k}.npy" for k in range(3)]]
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_latents_refuse_what_float16_cannot_hold(tmp_path):
    """A VAE whose moments overflow float16 stops encoding, and is named; a log-variance alone is bounded."""
    *_, flags = encoding(tmp_path)
    net = small_vae()
    for bias, channels in ((1e6, slice(4, 8)), (1e6, slice(0, 4))):
        net.quant_conv.bias.data[channels] = bias
        torch.save(net.state_dict(), tmp_path / "vae.bin")
        if channels.start:
            latents.main(flags)
            assert (data.dataset(flags[1]).item(0)[0][:, 4:] == 20).all()
    flags[1] = str(tmp_path / "other")
    raises(lambda: latents.main(flags), "vae.bin: gives moments that are not finite", "images 0 to 2")
    assert not list((tmp_path / "other").glob("moments_0000?.npy"))


@torch.no_grad()
def test_latents_encode_features(tmp_path, monkeypatch):
    """A frozen encoder's features stand beside the latents, of both sides of an image, and are found for the
    images that `stream` hands out; a folder without them is not the same set; stopped, it goes on."""
    images, _, flags = encoding(tmp_path, "--encoder", SMALL_ENCODER)
    latents.main(flags)
    encoder, ds = encoders.Encoder(SMALL_ENCODER, 32), data.dataset(str(tmp_path / "out"))
    assert encoder.shape == ds.features == (17, 12)
    assert [f.shape for f in ds.shards["features"]] == [(4, 2, 17, 12), (4, 2, 17, 12), (3, 2, 17, 12)]
    x = data.to_float(images)
    for mirror in (True, False):
        positions, found = list(range(40, 70)), encoders.StoredFeatures(ds, mirror)
        (items, *_), = data.stream(ds, [positions], 3, mirror)
        z = found(torch.zeros(1), data.Draws(3, positions))
        assert z.shape == (30, 17, 12) and found.shape == encoder.shape and z.dtype == torch.float32
        indices = [data.index_at(11, p, 3) for p in positions]
        sides = [items[k].equal(ds.item(i)[0][1]) for k, i in enumerate(indices)]
        want = torch.stack([x[i].flip(2) if side else x[i] for i, side in zip(indices, sides)])
        assert any(sides) == mirror and (z - encoder(want)).abs().max() < 1e-3

    raises(lambda: latents.main([*flags, "--encoder", ""]), "begun with encoder")
    renamed, replace = [], os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda a, b: replace(a, b) or renamed.append(b.name))
        latents.main([flags[0], str(tmp_path / "again"), *flags[2:]])
    assert renamed[:2] == ["features_00000.npy", "moments_00000.npy"]  # with its moments a shard is complete
    (tmp_path / "out/moments_00001.npy").unlink()
    before = (tmp_path / "out/features_00000.npy").stat().st_mtime_ns
    latents.main(flags)
    assert len(data.dataset(str(tmp_path / "out"))) == 11
    assert (tmp_path / "out/features_00000.npy").stat().st_mtime_ns == before
    assert not list((tmp_path / "out").glob("*.tmp*"))


@dataclasses.dataclass
class Settings:
    """What `encoder_features` asks of a training configuration."""
    loss: str = "repa"
    data: str = "here"
    encoder: str = ""
    mirror: str = "auto"


def test_encoders(encoded, capsys):
    """Training takes an encoder's features on images, loaded once, and stored ones on latents; one of the two
    must be there. A wrong encoder is refused; run alone, the file shows an encoder's shape."""
    images, stored = data.dataset(str(SMALL_SET)), data.dataset(str(encoded / "latents"))
    bare = data.dataset(str(encoded / "latents"))
    bare.features = None
    given = Settings(encoder=SMALL_ENCODER)
    found = encoders.encoder_features(given, images, "cpu")
    assert isinstance(found, encoders.Encoder) and found.shape == (17, 12)
    assert encoders.encoder_features(given, images) is found
    assert encoders.encoder_features(given, data.dataset(str(SMALL_SET), 16)) is not found  # of another size
    z = found(torch.rand(2, 3, 32, 32, requires_grad=True))
    assert z.shape == (2, 17, 12) and not z.requires_grad
    for mirror, expected in (("auto", True), ("on", True), ("off", False)):
        found = encoders.encoder_features(Settings(mirror=mirror), stored, "cpu")
        assert isinstance(found, encoders.StoredFeatures) and found.mirror == expected
        assert found.shape == (17, 12)
    raises(lambda: encoders.encoder_features(given, stored), "here holds features already", "leave --encoder")
    for cfg, source in ((Settings(), images), (Settings(), bare), (given, bare)):
        raises(lambda: encoders.encoder_features(cfg, source), "--loss repa", "FILE.py:NAME", "latents ..")

    raises(lambda: encoders.Encoder("none.py:patches", 32), "FILE.py:NAME")
    raises(lambda: encoders.Encoder(SMALL_ENCODER + "s", 32), "no function patchess")
    wrong = SMALL_ENCODER.replace(":patches", ":image")
    raises(lambda: encoders.Encoder(wrong, 32), "(1, 3, 32, 32) for 1 images", "1 + patches")
    encoders.main([SMALL_ENCODER, str(SMALL_SET)])
    shown = capsys.readouterr().out
    assert "(17, 12)" in shown and "within a class" in shown


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A folder with the codec vae.bin and with SMALL_SET's latents and features."""
    folder = tmp_path_factory.mktemp("encoded")
    torch.save(small_vae().state_dict(), folder / "vae.bin")
    latents.main([str(SMALL_SET), str(folder / "latents"), "--vae", str(folder / "vae.bin"), "--encoder",
                  SMALL_ENCODER, *"--size 32 --batch 50 --workers 0 --device cpu".split()])
    return folder


def test_latents_train(tmp_path, encoded, capsys, monkeypatch):
    """From latents to a run and its pictures: fm and pafm train on what encode wrote, sample.py and scores
    decode."""
    codec, stored = f"latents:{encoded / 'vae.bin'}", str(encoded / "latents")
    monkeypatch.setitem(model.ZOO, "tiny", model.ZOO["tiny"] | dict(patch=2))
    options = dict(data=stored, size=0, steps=2, predict="v", batch=4)
    moved, to = [], vae.VAE.to
    with monkeypatch.context() as patch:
        patch.setattr(vae.VAE, "to", lambda net, device: moved.append(device) or to(net, device))
        train.train(tiny_run(tmp_path / "fm", codec=codec, **options))
    assert moved == [torch.device("cpu")]  # the codec goes where the samples are
    train.train(tiny_run(tmp_path / "pafm", loss="pafm", candidates=3, bank=4, **options))
    assert "no --codec" in capsys.readouterr().err and not (tmp_path / "pafm/samples/final.png").exists()
    assert Image.open(tmp_path / "fm/samples/final.png").size[0] == 10 * 66 + 2

    net, labels = model.load(tmp_path / "fm/last.pt"), sample.labels_for(3, 10)
    assert net.shape == (4, 4, 4)
    flags = f"--n 3 --steps 2 --out {tmp_path / 's.npz'} --guide_channels 3".split()
    guidance.main([str(tmp_path / "fm"), "--codec", codec, *flags])
    assert "of the first 3 channels" in capsys.readouterr().out
    with np.load(tmp_path / "s.npz") as file:
        assert file["arr_0"].shape == (3, 32, 32, 3)
    net_codec = data.codec(codec)
    (_, fake), = sample.generate(net, labels, 0, codec=net_codec, steps=2)
    e = data.Draws(0, range(3)).normal("sample noise", net.shape)
    with torch.no_grad():
        want = data.to_uint8(net_codec.decode(sample.sample(net, e, labels, 2)))
    assert (want.int() - fake.int()).abs().max() <= 1
    raises(lambda: sample.main([str(tmp_path / "fm"), "--n", "3"]), "--codec")

    np.savez(tmp_path / "real.npz", arr_0=np.zeros((12, 32, 32, 3), np.uint8))
    how = dict(features="glyphs", steps=1, num=12, device="cpu")
    found = fid.evaluate(str(tmp_path / "fm"), str(tmp_path / "real.npz"), codec=codec, **how)
    assert found["n"] == 12 and found["scores"]["fd_glyphs"]["value"] > 0
    raises(lambda: fid.evaluate(str(tmp_path / "fm"), str(tmp_path / "real.npz"), **how), "--codec")


def test_latents_end_to_end(tmp_path, monkeypatch, capsys):
    """From class folders of JPEGs by latents to measured samples: 20 steps of fm, and from it of meanflow and
    cafm. Encoding and every training are stopped halfway and go on; each step is taken once."""
    for k, image in enumerate(data.glyphs(12, 48)[0]):
        place = tmp_path / f"images/n{k % 3:08d}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{k}.JPEG")
    torch.save(small_vae().state_dict(), tmp_path / "vae.pt")
    images, stored, file = (str(tmp_path / name) for name in ("images", "latents", "vae.pt"))
    flags = [images, stored, "--vae", file,
             *"--size 32 --batch 5 --shard 5 --workers 0 --device cpu".split()]

    def stopped(k, *rest):
        if k > 0:
            raise KeyboardInterrupt
        write_shard(k, *rest)

    write_shard = latents.write_shard
    with monkeypatch.context() as patch:
        patch.setattr(latents, "write_shard", stopped)
        with pytest.raises(KeyboardInterrupt):
            latents.main(flags)
    raises(lambda: data.dataset(stored), "moments_00001.npy", "2 of 3")
    latents.main(flags)

    monkeypatch.setitem(model.ZOO, "tiny", model.ZOO["tiny"] | dict(patch=2, depth=2, width=32, predict="v"))
    for loss in ("fm", "meanflow", "cafm"):
        out = tmp_path / loss
        start = {} if loss == "fm" else dict(init=str(tmp_path / "fm"))
        start |= dict(d_steps=2) if loss == "cafm" else {}
        cfg = tiny_run(out, loss=loss, steps=20, batch=4, log_every=1, data=stored, size=0,
                       codec=f"latents:{file}", **start)
        with monkeypatch.context() as patch:
            asked = iter([False] * 9 + [True])
            patch.setattr(train.StopSignal, "on_any_process", lambda stop: next(asked))
            assert not train.train(cfg) and model.read_checkpoint(out / "last.pt")["step"] == 10
        train.train(dataclasses.replace(cfg, resume=True))
        assert [row["step"] for row in train.read_log(out / "log.jsonl")] == list(range(1, 21))
        flags = f"--n 12 --steps {1 if loss == 'meanflow' else 2} --guidance 1 --out {out / 's.npz'}".split()
        sample.main([str(out), "--codec", f"latents:{file}", *flags])
        capsys.readouterr()
        flags = "--features glyphs --size 32 --device cpu --workers 0 --json".split()
        fid.main([str(out / "s.npz"), images, *flags])
        found = json.loads(capsys.readouterr().out)
        assert found["n"] == found["n_ref"] == 12 and found["scores"]["fd_glyphs"]["value"] > 0
    assert model.load(tmp_path / "cafm/last.pt").num_classes == 3
