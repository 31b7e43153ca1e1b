"""Golden of the pictures: image.safetensors, small files in every format and the pixels that PIL makes of them.

    OMP_NUM_THREADS=1 python golden/image.py

`file/NAME` holds the bytes of a picture file, `hf/NAME` the RGB pixels of transformers' PIL image processor (which
since 5.x lays transparency on white; 4.57 drops it), `default/NAME` those with EXIF orientation applied and 16-bit
samples scaled, where they differ. `resize/WxH` are bicubic resizings of `source/...`; `pixel_values` is the output of
BlipImageProcessor. All pictures are drawn here; PIL is the judge, so what it can't write is put together by hand.

Pillow is of version 12: 13.0 began to run the vertical pass of a resizing first where the height shrinks much more than
the width, which every version before, and so every published result, did not.
"""

import io
import math
import struct
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BlipImageProcessor

from common import arguments, versions, write_tensors

RANDOM = np.random.default_rng(7)
FILES = {}


def photo(width, height, contrast=1.0):
    """Smooth shades, hard edges and a little noise."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = [np.sin(x / 7 + c) * np.cos(y / (5 + c)) for c in range(3)]
    pixels = 127 + 90 * np.stack(waves, -1)
    pixels[(x - width / 2) ** 2 + (y - height / 2) ** 2 < (width * height) / 16] = (220, 30, 60)
    pixels[(x // 5 + y // 3) % 7 == 0] += 50
    pixels = 127 + contrast * (pixels + RANDOM.normal(0, 6, pixels.shape) - 127)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def noise(size):
    return RANDOM.integers(0, 256, size, dtype=np.uint8).tobytes()


def save(name, image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    FILES[name] = file.getvalue()
    return FILES[name]


def turned(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


# ---------------------------------------------------------------- JPEG

def segments(jpeg):
    """(marker, bytes) up to the first scan, whose entropy data and all that follows is the last item's."""
    at = 2
    while True:
        marker, length = jpeg[at + 1], struct.unpack(">H", jpeg[at + 2:at + 4])[0]
        if marker == 0xDA:
            yield marker, jpeg[at + 4:at + 2 + length], jpeg[at + 2 + length:]
            return
        yield marker, jpeg[at + 4:at + 2 + length], b""
        at += 2 + length


def resampled(name, width, height, factors, contrast):
    """A grey JPEG's blocks relabelled as components with any sampling factors: PIL itself writes only three kinds."""
    across, down = max(f >> 4 for f in factors), max(f & 15 for f in factors)
    mcus = math.ceil(width / 8 / across) * math.ceil(height / 8 / down)
    blocks = mcus * sum((f >> 4) * (f & 15) for f in factors)
    file = io.BytesIO()
    photo(blocks * 8, 8, contrast).convert("L").save(file, "JPEG", quality=75, optimize=True)
    out = b"\xff\xd8"
    for marker, body, rest in segments(file.getvalue()):
        n = len(factors)
        if marker == 0xC0:
            body = struct.pack(">BHHB", 8, height, width, n) + b"".join(bytes([i, f, 0]) for i, f in enumerate(factors, 1))
        if marker == 0xDA:
            body = bytes([n]) + b"".join(bytes([i, 0]) for i in range(1, n + 1)) + body[-3:]
        out += bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + rest
    FILES[f"jpeg_sampling_{name}"] = out


def jpegs():
    picture = photo(45, 37)
    for subsampling, name in enumerate(["444", "422", "420"]):
        for quality in (40, 95):
            save(f"jpeg_{name}_q{quality}", picture, "JPEG", quality=quality, subsampling=subsampling)
        save(f"jpeg_{name}_progressive", picture, "JPEG", quality=85, subsampling=subsampling, progressive=True)
    for width in (1, 2, 3, 4, 5, 8, 9, 15, 16, 17):
        save(f"jpeg_420_{width}", photo(width, 18 - width), "JPEG", quality=80, subsampling=2, progressive=width % 2 == 0)
        save(f"jpeg_422_{width}", photo(width, 18 - width), "JPEG", quality=80, subsampling=1)
    save("jpeg_noise", Image.fromarray(RANDOM.integers(0, 256, (31, 29, 3), dtype=np.uint8)), "JPEG", quality=100, subsampling=2)
    save("jpeg_restart", picture, "JPEG", quality=80, restart_marker_blocks=3)
    save("jpeg_restart_progressive", picture, "JPEG", quality=80, restart_marker_rows=1, progressive=True)
    save("jpeg_optimized", picture, "JPEG", quality=80, optimize=True)
    save("jpeg_grey", picture.convert("L"), "JPEG", quality=80)
    save("jpeg_grey_progressive", picture.convert("L"), "JPEG", quality=80, progressive=True)
    save("jpeg_rgb", picture, "JPEG", quality=80, keep_rgb=True)
    for orientation in (1, 3, 6):
        save(f"jpeg_exif{orientation}", photo(19, 14), "JPEG", quality=80, exif=turned(orientation))
    cmyk = save("jpeg_cmyk", picture.convert("CMYK"), "JPEG", quality=80)
    adobe = cmyk.index(b"Adobe") + 11
    FILES["jpeg_ycck"] = cmyk[:adobe] + b"\2" + cmyk[adobe + 1:]
    FILES["jpeg_cmyk_no_adobe"] = cmyk[:adobe - 15] + cmyk[adobe + 1:]
    plain = save("jpeg_jfif", photo(20, 13), "JPEG", quality=80, subsampling=0)
    bare = plain[:2] + plain[20:]
    FILES["jpeg_no_jfif"] = bare
    for transform in (0, 1):
        FILES[f"jpeg_adobe{transform}"] = bare[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform]) + bare[2:]
    FILES["jpeg_trailing"] = plain + b"no more"
    FILES["jpeg_fill_bytes"] = plain[:2] + b"\xff\xff" + plain[2:]
    for name, factors in {
        "440": (0x12, 0x11, 0x11), "411": (0x41, 0x11, 0x11), "141": (0x14, 0x11, 0x11), "410": (0x42, 0x11, 0x11),
        "chroma_larger": (0x11, 0x21, 0x12), "mixed": (0x22, 0x21, 0x12), "thirds": (0x31, 0x11, 0x11),
        "cmyk": (0x22, 0x11, 0x11, 0x22),
    }.items():
        resampled(name, 37, 27, factors, 0.3)
        resampled(name + "_overflow", 21, 19, factors, 1.0)


# ---------------------------------------------------------------- PNG and WebP

def png(name, width, height, depth, colour, rows, palette=None, key=None):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data += chunk(b"PLTE", palette) if palette else b""
    data += chunk(b"tRNS", key) if key is not None else b""
    data += chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows), 9)) + chunk(b"IEND", b"")
    FILES[name] = data


def shorts(width, height, channels, top=65536):
    values = RANDOM.integers(0, top, (height, width * channels))
    values[0, :7] = [0, 1, 254, 255, 256, 257, 300]
    return [row.astype(">u2").tobytes() for row in values]


def pngs():
    width, height = 21, 9
    picture = photo(33, 25)
    for mode in ("RGB", "L", "P", "1"):
        save(f"png_{mode}", picture.convert(mode), "PNG")
    alpha = picture.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    save("png_RGBA", alpha, "PNG")
    save("png_LA", alpha.convert("LA"), "PNG")
    save("png_exif6", photo(19, 14), "PNG", exif=turned(6))
    save("png_animated", alpha, "PNG", save_all=True, append_images=[alpha.rotate(90)])
    for depth in (1, 2, 4, 8):
        def rows():
            return [noise((width * depth + 7) // 8) for _ in range(height)]

        png(f"png_grey{depth}", width, height, depth, 0, rows())
        for key in (0, (1 << depth) - 1):
            png(f"png_grey{depth}_key{key}", width, height, depth, 0, rows(), key=struct.pack(">H", key))
        palette = noise(3 << depth)
        png(f"png_palette{depth}", width, height, depth, 3, rows(), palette)
        png(f"png_palette{depth}_alpha", width, height, depth, 3, rows(), palette, noise(1 << depth))
        png(f"png_palette{depth}_clear", width, height, depth, 3, rows(), palette, b"\xff\0")
    png("png_palette_short", 21, 1, 8, 3, [bytes(range(21))], bytes(range(30)))
    row = bytes([1, 2, 3, 1, 2, 4] * 10)
    png("png_rgb8_key", 20, 2, 8, 2, [row, row], key=struct.pack(">HHH", 1, 2, 3))
    png("png_grey16", width, height, 16, 0, shorts(width, height, 1, 600))
    png("png_grey16_wide", width, height, 16, 0, shorts(width, height, 1))
    png("png_grey16_key", width, height, 16, 0, shorts(width, height, 1, 600), key=struct.pack(">H", 300))
    png("png_grey16_key255", width, height, 16, 0, shorts(width, height, 1, 600), key=struct.pack(">H", 255))
    png("png_la16", width, height, 16, 4, shorts(width, height, 2))
    png("png_rgb16", width, height, 16, 2, shorts(width, height, 3))
    png("png_rgb16_key", 4, 1, 16, 2, [struct.pack(">12H", *[300] * 3, *[0x2C2C] * 3, *[44] * 3, 0, 1, 2)], key=struct.pack(">HHH", 300, 300, 300))
    png("png_rgba16", width, height, 16, 6, shorts(width, height, 4))


def webps():
    picture = photo(45, 37)
    alpha = picture.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    for quality in (10, 60, 95):
        save(f"webp_q{quality}", picture, "WEBP", quality=quality)
    save("webp_odd", photo(17, 1), "WEBP", quality=80)
    save("webp_lossless", picture, "WEBP", lossless=True)
    save("webp_alpha", alpha, "WEBP", quality=60, alpha_quality=30)
    save("webp_alpha_lossless", alpha, "WEBP", lossless=True, exact=True)
    save("webp_exif6", photo(19, 14), "WEBP", lossless=True, exif=turned(6))
    save("webp_animated", alpha, "WEBP", save_all=True, append_images=[alpha.rotate(180)], quality=50)


# ---------------------------------------------------------------- GIF and BMP

def lzw(indices):
    """Eight-bit GIF data with a clear code so often that all codes have nine bits."""
    bits = count = 0
    out = bytearray()
    codes = [code for i, index in enumerate(indices) for code in ([256] if i % 100 == 0 else []) + [int(index)]] + [257]
    for code in codes:
        bits |= code << count
        count += 9
        while count >= 8:
            out.append(bits & 255)
            bits >>= 8
            count -= 8
    out.append(bits & 255)
    blocks = [bytes(out[i:i + 255]) for i in range(0, len(out), 255)]
    return b"\x08" + b"".join(bytes([len(b)]) + b for b in blocks) + b"\0"


def gif(name, frame, clear=None, local=None, shared=True):
    x, y, width, height = frame
    data = b"GIF89a" + struct.pack("<HH", 20, 15) + (b"\xf7\5\0" + noise(768) if shared else b"\x70\5\0")
    data += b"\x21\xf9\4\1\0\0" + bytes([clear]) + b"\0" if clear is not None else b""
    data += b"\x2c" + struct.pack("<HHHH", x, y, width, height) + (b"\x87" + local if local else b"\0")
    FILES[name] = data + lzw(RANDOM.integers(0, 64, width * height)) + b";"


def gifs():
    picture = photo(33, 25)
    save("gif", picture.quantize(40), "GIF")
    save("gif_straight", picture.quantize(40), "GIF", interlace=0)
    save("gif_grey", picture.convert("L"), "GIF")
    save("gif_animated", picture.quantize(9), "GIF", save_all=True, append_images=[picture.rotate(90).quantize(9)])
    gif("gif_clear", (0, 0, 20, 15), clear=7)
    gif("gif_local", (0, 0, 20, 15), local=noise(768), shared=False)
    gif("gif_small_frame", (3, 4, 10, 8))
    gif("gif_small_frame_clear", (3, 4, 10, 8), clear=9)
    gif("gif_small_frame_local", (3, 4, 10, 8), local=noise(768))
    gif("gif_large_frame", (12, 4, 15, 18))


def bmp(name, bits, data, width=13, height=9, compression=0, size=40, masks=b"", palette=b"", colours=0, extra=b""):
    header = struct.pack("<IiiHHIIiiII", size, width, height, 1, bits, compression, len(data), 2835, 2835, colours, 0)
    start = 14 + len(header + extra + masks + palette)
    FILES[name] = b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + extra + masks + palette + data


def bmps():
    def rows(bits):
        return noise((13 * bits + 31) // 32 * 4 * 9)

    bmp("bmp_24", 24, rows(24))
    bmp("bmp_24_top_down", 24, rows(24), height=-9)
    bmp("bmp_32", 32, rows(32))
    bmp("bmp_16", 16, rows(16))
    bmp("bmp_16_565", 16, rows(16), compression=3, masks=struct.pack("<III", 0xF800, 0x7E0, 0x1F))
    bmp("bmp_32_masks", 32, rows(32), compression=3, masks=struct.pack("<III", 0xFF000000, 0xFF0000, 0xFF00))
    order = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs"
    bmp("bmp_v4_alpha", 32, rows(32), compression=3, size=108, extra=order + bytes(48))
    bmp("bmp_v5_alpha", 32, rows(32), compression=3, size=124, extra=order + bytes(64))
    bmp("bmp_v4_plain", 32, rows(32), size=108, extra=order + bytes(48))
    for bits in (1, 4, 8):
        bmp(f"bmp_{bits}", bits, rows(bits), palette=noise(4 << bits))
    bmp("bmp_8_few", 8, bytes(i % 20 for i in range(16 * 9)), palette=noise(80), colours=20)
    runs = bytes([3, 7, 0, 3, 1, 2, 3, 0, 0, 0, 2, 5, 0, 2, 2, 0, 2, 9, 0, 0, 6, 1, 0, 1])
    bmp("bmp_rle8", 8, runs, 6, 3, 1, palette=noise(1024))
    runs = bytes([3, 0x12, 3, 0x34, 0, 0, 0, 4, 0x12, 0x34, 0, 0, 6, 0x21, 0, 1])
    bmp("bmp_rle4", 4, runs, 6, 3, 2, palette=noise(64))
    FILES["bmp_os2"] = b"BM" + struct.pack("<IHHIIHHHH", 0, 0, 0, 26 + 768, 12, 13, 9, 1, 8) + noise(768) + rows(8)


# ---------------------------------------------------------------- TIFF

def tiff(name, bits, samples, photometric, strips, big=False, tiled=False, **tags):
    """A TIFF file out of its packed strips; tags are given as t<number>=(type, values)."""
    order = ">" if big else "<"
    fields = {256: ("I", [21]), 257: ("I", [14]), 258: ("H", [bits] * samples), 259: ("H", [1]), 262: ("H", [photometric]), 277: ("H", [samples])}
    fields.update({int(tag[1:]): value for tag, value in tags.items()})
    data, offsets = b"", []
    for strip in strips:
        offsets.append(8 + len(data))
        data += strip + b"\0" * (len(strip) % 2)
    fields[324 if tiled else 273] = ("I", offsets)
    fields[325 if tiled else 279] = ("I", [len(strip) for strip in strips])
    directory, beyond = b"", b""
    after = 8 + len(data) + 2 + 12 * len(fields) + 4
    for tag in sorted(fields):
        kind, values = fields[tag]
        raw = struct.pack(order + kind * len(values), *values)
        if len(raw) > 4:
            raw, beyond = struct.pack(order + "I", after + len(beyond)), beyond + raw
        directory += struct.pack(order + "HHI", tag, {"H": 3, "I": 4}[kind], len(values)) + raw.ljust(4, b"\0")
    start = (b"MM\0*" if big else b"II*\0") + struct.pack(order + "I", 8 + len(data))
    FILES[name] = start + data + struct.pack(order + "H", len(fields)) + directory + bytes(4) + beyond


def tiffs():
    picture = photo(33, 25)
    for mode in ("RGB", "L", "P", "1", "CMYK"):
        save(f"tiff_{mode}", picture.convert(mode), "TIFF")
    for packing in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        save(f"tiff_{packing.removeprefix('tiff_')}", picture, "TIFF", compression=packing)
    save("tiff_jpeg_grey", picture.convert("L"), "TIFF", compression="jpeg")
    save("tiff_lzw_palette", picture.convert("P"), "TIFF", compression="tiff_lzw")
    for orientation in range(1, 9):
        save(f"tiff_orientation{orientation}", photo(7, 5), "TIFF", exif=turned(orientation))
    for big in (False, True):
        end = "big" if big else "little"
        for bits in (1, 2, 4, 8, 16):
            tiff(f"tiff_grey{bits}_{end}", bits, 1, 1, [noise((21 * bits + 7) // 8 * 14)], big)
        tiff(f"tiff_inverted_{end}", 8, 1, 0, [noise(21 * 14)], big)
        tiff(f"tiff_rgb16_{end}", 16, 3, 2, [noise(21 * 14 * 6)], big)
        packed = zlib.compress(noise(21 * 14 * 6))
        tiff(f"tiff_rgb16_predictor_{end}", 16, 3, 2, [packed], big, t259=("H", [8]), t317=("H", [2]))
    for bits in (1, 4, 8):
        colours = RANDOM.integers(0, 65536, 3 << bits).tolist()
        tiff(f"tiff_palette{bits}", bits, 1, 3, [noise((21 * bits + 7) // 8 * 14)], t320=("H", colours))
    for extra in (0, 1, 2):
        tiff(f"tiff_rgba_extra{extra}", 8, 4, 2, [noise(21 * 14 * 4)], t338=("H", [extra]))
    tiff("tiff_la", 8, 2, 1, [noise(21 * 14 * 2)], t338=("H", [2]))
    tiff("tiff_planes", 8, 3, 2, [noise(21 * 14) for _ in range(3)], t284=("H", [2]))
    tiff("tiff_strips", 8, 3, 2, [noise(21 * 3 * n) for n in (5, 5, 4)], t278=("I", [5]))
    tile = {"t322": ("I", [16]), "t323": ("I", [16])}
    tiff("tiff_tiles", 8, 3, 2, [noise(768), noise(768)], tiled=True, **tile)
    packed = [zlib.compress(noise(768)) for _ in range(2)]
    tiff("tiff_tiles_deflate", 8, 3, 2, packed, tiled=True, t259=("H", [8]), t317=("H", [2]), **tile)
    tiff("tiff_bit_order", 1, 1, 1, [noise(3 * 14)], t266=("H", [2]))


# ---------------------------------------------------------------- expectations

def opened(name):
    return Image.open(io.BytesIO(FILES[name]))


def hf(image):
    """What BlipImageProcessor of transformers 5.x makes of an opened picture before it resizes it."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.array(image.convert("RGB"))


def default(name):
    """The pixels with EXIF orientation applied and 16 bits scaled; None when that is what `hf` gives."""
    if "exif" in name:
        return np.array(ImageOps.exif_transpose(opened(name)).convert("RGB"))
    if name in ("png_grey16", "png_grey16_wide", "tiff_grey16_little"):
        wide = np.array(opened(name)).astype(np.int64)
        return np.repeat(((wide * 255 + 32767) // 65535).astype(np.uint8)[..., None], 3, -1)
    return None


def main():
    args = arguments(__doc__)
    for make in (jpegs, pngs, webps, gifs, bmps, tiffs):
        make()
    out = {}
    for name, data in FILES.items():
        out[f"file/{name}"] = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
        out[f"hf/{name}"] = torch.from_numpy(hf(opened(name)))
        if (other := default(name)) is not None:
            out[f"default/{name}"] = torch.from_numpy(other.copy())
    sizes = {
        (61, 47): [(97, 83), (13, 17), (61, 20), (20, 47), (62, 48), (1, 1), (61, 47), (122, 3), (3, 94)],
        (1, 1): [(5, 3)], (2, 3): [(7, 8)], (300, 2): [(7, 7)], (3, 200): [(9, 11)], (128, 96): [(32, 24), (31, 23)],
    }
    for (width, height), targets in sizes.items():
        source = photo(width, height, 1.6)
        out[f"source/{width}x{height}"] = torch.from_numpy(np.array(source))
        for target in targets:
            small = source.resize(target, Image.Resampling.BICUBIC)
            out[f"resize/{width}x{height}/{target[0]}x{target[1]}"] = torch.from_numpy(np.array(small))
    processor = BlipImageProcessor(size={"height": 28, "width": 28})
    out["pixel_values"] = torch.from_numpy(processor(opened("jpeg_420_q95"))["pixel_values"][0])
    write_tensors(args, "image", out, versions=versions("pillow", "transformers", "numpy"), source="jpeg_420_q95")


if __name__ == "__main__":
    main()
