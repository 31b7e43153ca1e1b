//! Pictures: pixels, resizing and normalising equal to PIL's and transformers' to the bit, and
//! bad input refused quickly. The golden file is made by `golden/image.py`.

#![allow(clippy::unwrap_used, reason = "helpers of tests, too, are tests")]

use std::collections::HashMap;
use std::time::{Duration, Instant};

use blip2::Error;
use blip2::image::{Normalize, Pixels, Rgb, decode, open, preprocess, to_tensor};
use candle_core::{Device, Tensor};

fn golden() -> HashMap<String, Tensor> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../golden/image.safetensors");
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// A golden picture of shape (h, w, 3).
fn picture(tensor: &Tensor) -> Rgb {
    let (height, width, _) = tensor.dims3().unwrap();
    Rgb { width: width as u32, height: height as u32, data: bytes(tensor) }
}

/// The files of the golden, sorted by name.
fn files(golden: &HashMap<String, Tensor>) -> Vec<(String, Vec<u8>)> {
    let named = |(key, tensor): (&String, &Tensor)| {
        key.strip_prefix("file/").map(|name| (name.to_string(), bytes(tensor)))
    };
    let mut files: Vec<_> = golden.iter().filter_map(named).collect();
    files.sort();
    files
}

/// Largest difference and share of differing samples, for a message.
fn difference(a: &Rgb, b: &Rgb) -> String {
    if (a.width, a.height) != (b.width, b.height) {
        return format!("{a:?} instead of {b:?}");
    }
    let differ = a.data.iter().zip(&b.data).map(|(a, b)| a.abs_diff(*b));
    let (largest, count) = differ.fold((0, 0), |(m, n), d| (m.max(d), n + usize::from(d > 0)));
    format!("{count} of {} samples differ, by {largest} at most", a.data.len())
}

/// A PNG header that promises a picture, and nothing behind it but a little data.
fn png_of(width: u32, height: u32) -> Vec<u8> {
    let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
    let mut chunk = |kind: &[u8; 4], data: &[u8]| {
        let body = [kind.as_slice(), data].concat();
        file.extend((data.len() as u32).to_be_bytes());
        file.extend(&body);
        file.extend(crc32(&body).to_be_bytes());
    };
    let size = [width.to_be_bytes(), height.to_be_bytes()].concat();
    chunk(b"IHDR", &[size.as_slice(), &[8, 2, 0, 0, 0]].concat());
    chunk(b"IDAT", &[0x78, 0x9C, 3, 0, 0, 0, 0, 1]);
    chunk(b"IEND", &[]);
    file
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, &b| (0..8).fold(crc ^ u32::from(b), |crc, _| step(crc)))
}

#[test]
fn hf_pixels_are_those_of_pil() {
    let golden = golden();
    let mut wrong = Vec::new();
    for (name, file) in files(&golden) {
        let expected = picture(&golden[&format!("hf/{name}")]);
        match decode(&file, Pixels::Hf) {
            Ok(got) if got == expected => {}
            Ok(got) => wrong.push(format!("{name}: {}", difference(&got, &expected))),
            Err(e) => wrong.push(format!("{name}: {e}")),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn default_pixels_are_upright_and_scaled() {
    let golden = golden();
    let mut differing = 0;
    for (name, file) in files(&golden) {
        let got = decode(&file, Pixels::Default).unwrap();
        if let Some(expected) = golden.get(&format!("default/{name}")) {
            let expected = picture(expected);
            assert!(got == expected, "{name}: {}", difference(&got, &expected));
            differing += 1;
        } else if !name.contains("16") && !name.contains("key") && !name.contains("frame") {
            let expected = picture(&golden[&format!("hf/{name}")]);
            assert!(got == expected, "{name}: {}", difference(&got, &expected));
        }
    }
    assert!(differing >= 8, "{differing}");
}

#[test]
fn default_transparency_is_what_the_file_says() {
    // 2-bit grey, values 0 1 2 3, of which 1 is transparent: PIL looks for a scaled value of 1.
    let mut grey = png_of(4, 1);
    grey[24] = 2;
    grey[25] = 0;
    let raw = [&[0x78, 0x01, 1, 2, 0, 0xFD, 0xFF, 0, 0b0001_1011][..], &adler(&[0, 0x1B])].concat();
    let file = rebuilt(&grey[16..29], &[(b"tRNS", vec![0, 1]), (b"IDAT", raw), (b"IEND", vec![])]);
    let values = |pixels| decode(&file, pixels).unwrap().data.chunks(3).map(|p| p[0]).collect();
    let (default, hf): (Vec<u8>, Vec<u8>) = (values(Pixels::Default), values(Pixels::Hf));
    assert_eq!(default, [0, 255, 170, 255]);
    assert_eq!(hf, [0, 85, 170, 255]);
}

fn adler(bytes: &[u8]) -> [u8; 4] {
    let (a, b) = bytes.iter().fold((1u32, 0u32), |(a, b), &v| {
        let a = (a + u32::from(v)) % 65521;
        (a, (b + a) % 65521)
    });
    (b << 16 | a).to_be_bytes()
}

fn rebuilt(header: &[u8], chunks: &[(&[u8; 4], Vec<u8>)]) -> Vec<u8> {
    let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
    for (kind, data) in [(b"IHDR", header.to_vec())].iter().chain(chunks) {
        let body = [kind.as_slice(), data].concat();
        file.extend((data.len() as u32).to_be_bytes());
        file.extend(&body);
        file.extend(crc32(&body).to_be_bytes());
    }
    file
}

#[test]
fn resizing_is_that_of_pil() {
    let golden = golden();
    let mut count = 0;
    for (key, expected) in &golden {
        let Some(sizes) = key.strip_prefix("resize/") else { continue };
        let (from, to) = sizes.split_once('/').unwrap();
        let source = picture(&golden[&format!("source/{from}")]);
        let (width, height) = to.split_once('x').unwrap();
        let got = source.resize_bicubic(width.parse().unwrap(), height.parse().unwrap());
        let expected = picture(expected);
        assert!(got == expected, "{sizes}: {}", difference(&got, &expected));
        count += 1;
    }
    assert_eq!(count, 15);
}

#[test]
fn pixel_values_are_those_of_transformers() {
    let golden = golden();
    let picture = decode(&bytes(&golden["file/jpeg_420_q95"]), Pixels::Hf).unwrap();
    let got = preprocess(&picture, 28, &Normalize::CLIP).unwrap();
    let expected = &golden["pixel_values"];
    assert_eq!(got.dims(), expected.dims());
    let bits = |t: &Tensor| -> Vec<u32> {
        let values: Vec<f32> = t.flatten_all().unwrap().to_vec1().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    };
    assert_eq!(bits(&got), bits(expected));
}

#[test]
fn geometry() {
    let data: Vec<u8> = (0..5 * 4 * 3).collect();
    let picture = Rgb { width: 5, height: 4, data };
    assert_eq!(picture.resize_bicubic(5, 4), picture);
    assert_eq!(picture.flip_horizontal().flip_horizontal(), picture);
    assert_eq!(picture.flip_horizontal().data[..3], picture.data[12..15]);
    assert_eq!(picture.crop(0, 0, 5, 4), picture);
    let part = picture.crop(1, 2, 2, 1);
    assert_eq!((part.width, part.height, part.data), (2, 1, picture.data[33..39].to_vec()));
    let beyond = picture.crop(4, 3, 9, 9);
    assert_eq!((beyond.width, beyond.height, beyond.data), (1, 1, picture.data[57..60].to_vec()));
    assert_eq!(picture.crop(7, 7, 2, 2).data.len(), 0);
    assert_eq!(picture.resize_bicubic(0, 3).width, 1);
}

#[test]
fn narrow_pictures_work() {
    for (width, height) in [(1, 1), (1, 65_535), (65_535, 1), (2, 3)] {
        let picture = Rgb { width, height, data: vec![200; (width * height * 3) as usize] };
        let small = picture.resize_bicubic(24, 24);
        assert!(small.data.iter().all(|&v| v == 200), "{width}x{height}");
        assert_eq!(to_tensor(&small, &Normalize::IMAGENET).unwrap().dims(), [3, 24, 24]);
    }
}

/// Decodes what must be refused, in both ways and at once, and gives the reason.
fn refused(what: &str, file: &[u8]) -> String {
    let begin = Instant::now();
    let reasons = [Pixels::Hf, Pixels::Default].map(|pixels| match decode(file, pixels) {
        Err(Error::Image(reason)) => reason,
        other => panic!("{what}: {other:?}"),
    });
    assert!(begin.elapsed() < Duration::from_secs(2), "{what} took {:?}", begin.elapsed());
    reasons[0].clone()
}

#[test]
fn what_is_no_picture_is_refused() {
    assert_eq!(refused("nothing", b""), "an empty file");
    assert!(refused("html", b"\n <!DOCTYPE html><html></html>").contains("HTML"));
    assert!(refused("text", b"hello").contains("known format"));
    assert!(refused("zeros", &[0; 1000]).contains("known format"));
    for start in [&b"\xff\xd8\xff"[..], b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"MM\0*"]
    {
        refused("a bare signature", start);
        refused("a signature and zeros", &[start, &[0; 500]].concat());
        refused("a signature and ones", &[start, &[255; 500]].concat());
    }
    refused("a bare WebP", b"RIFF\0\0\0\0WEBP");
}

#[test]
fn bombs_are_refused_by_their_header() {
    let side = 40_000u16;
    let wide = u32::from(side);
    let (le, be) = (side.to_le_bytes(), side.to_be_bytes());
    let frame = [0xFF, 0xD8, 0xFF, 0xC0, 0, 11, 8, be[0], be[1], be[0], be[1], 1, 1, 0x11, 0];
    let gif =
        [b"GIF89a".as_slice(), &le, &le, &[0x80, 0, 0], &[0; 6], &[0x2C, 0, 0, 0, 0]].concat();
    let mut bmp = b"BM\0\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0".to_vec();
    bmp.extend([wide.to_le_bytes(), wide.to_le_bytes()].concat());
    bmp.extend([1, 0, 24, 0]);
    bmp.extend([0; 400]);
    let mut tiff = b"II*\0\x08\0\0\0\x02\0".to_vec();
    for tag in [256u16, 257] {
        tiff.extend(tag.to_le_bytes());
        tiff.extend([4, 0, 1, 0, 0, 0]);
        tiff.extend(wide.to_le_bytes());
    }
    let lossless = 0x2Fu64 | 16_382 << 8 | 16_382 << 22;
    let mut webp = b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0".to_vec();
    webp.extend(&lossless.to_le_bytes()[..5]);
    webp.extend([0; 9]);
    for (what, file) in [
        ("PNG", png_of(wide, wide)),
        ("JPEG", frame.to_vec()),
        ("GIF", gif),
        ("BMP", bmp),
        ("TIFF", tiff),
        ("WebP", webp),
    ] {
        let reason = refused(what, &file);
        assert!(reason.contains("limit is 100 megapixels"), "{what}: {reason}");
    }
    assert!(refused("long PNG", &png_of(65_536, 1)).contains("a side may have 65535"));
    // Within the limits, but the data never comes.
    refused("lying PNG", &png_of(10_000, 10_000));
    let lying = [0xFF, 0xD8, 0xFF, 0xC0, 0, 11, 8, 0x27, 0x10, 0x27, 0x10, 1, 1, 0x11, 0];
    assert!(refused("lying JPEG", &lying).contains("cut"));
}

#[test]
fn cut_files_are_refused() {
    let golden = golden();
    for name in [
        "jpeg_420_q95",
        "jpeg_444_progressive",
        "jpeg_grey",
        "jpeg_restart",
        "jpeg_cmyk",
        "png_RGB",
        "png_palette8_alpha",
        "png_rgb16",
        "webp_q60",
        "webp_lossless",
        "webp_alpha",
        "gif",
        "gif_straight",
        "bmp_24",
        "bmp_8",
        "bmp_rle8",
        "tiff_RGB",
        "tiff_lzw",
        "tiff_deflate",
        "tiff_packbits",
        "tiff_jpeg",
    ] {
        let file = bytes(&golden[&format!("file/{name}")]);
        for part in [10, 25, 50, 75, 90] {
            refused(&format!("{part} % of {name}"), &file[..file.len() * part / 100]);
        }
    }
}

/// A grey JPEG 24 pixels wide, of rows of blocks one below the other that are those of the pictures `of`, each behind a
/// restart marker, so that a row does not depend on where it stands.
fn stacked(rows: &[usize], of: &[Vec<u8>]) -> Vec<u8> {
    let scan = |file: &[u8]| {
        let at = file.windows(2).position(|pair| pair == [0xFF, 0xDA]).unwrap();
        at + 2 + usize::from(file[at + 3])
    };
    let head = &of[0][..scan(&of[0])];
    let mut file = head.to_vec();
    let size = file.windows(2).position(|pair| pair == [0xFF, 0xC0]).unwrap() + 5;
    file[size..size + 2].copy_from_slice(&(8 * rows.len() as u16).to_be_bytes());
    let before = file.windows(2).position(|pair| pair == [0xFF, 0xDA]).unwrap();
    file.splice(before..before, [0xFF, 0xDD, 0, 4, 0, 3]);
    for (i, row) in rows.iter().enumerate() {
        if i > 0 {
            file.extend([0xFF, 0xD0 + ((i - 1) % 8) as u8]);
        }
        let source = &of[*row];
        file.extend(&source[scan(source)..source.len() - 2]);
    }
    file.extend([0xFF, 0xD9]);
    file
}

/// Entropy data is read a strip of rows ahead of the transforms: every row must end up where it belongs.
#[test]
fn rows_of_many_strips_stand_where_they_belong() {
    let one = |seed: u32| {
        let grey: Vec<u8> = (0..24 * 8u32).map(|i| ((i * i * (seed + 3)) >> 3) as u8).collect();
        let mut file = Vec::new();
        let mut encoder = ::image::codecs::jpeg::JpegEncoder::new_with_quality(&mut file, 90);
        encoder.encode(&grey, 24, 8, ::image::ExtendedColorType::L8).unwrap();
        file
    };
    let of: Vec<Vec<u8>> = (0..3).map(one).collect();
    let alone: Vec<Rgb> = of.iter().map(|file| decode(file, Pixels::Hf).unwrap()).collect();
    for count in [1, 2, 15, 16, 17, 31, 32, 33, 50] {
        let rows: Vec<usize> = (0..count).map(|i| i * i % 7 % 3).collect();
        let file = stacked(&rows, &of);
        let whole = decode(&file, Pixels::Hf).unwrap();
        let expected: Vec<u8> = rows.iter().flat_map(|row| alone[*row].data.clone()).collect();
        assert_eq!((whole.width, whole.height), (24, 8 * count as u32));
        assert!(whole.data == expected, "{count} rows");
        // A row that is missing is told, in whichever strip.
        let marker = [0xFF, 0xD0 + ((count + 6) % 8) as u8];
        if let Some(last) = file.windows(2).rposition(|pair| pair == marker) {
            refused(&format!("{count} rows, the last cut"), &file[..last + 4]);
        }
    }
}

#[test]
fn a_damaged_png_is_told_in_words() {
    let mut file = png_of(4, 1);
    // The last byte of the header's checksum.
    file[32] ^= 1;
    let reason = refused("flipped bit", &file);
    assert!(reason.contains("IHDR chunk") && !reason.contains("ChunkType"), "{reason}");
}

/// One sequential picture of 21×19 pixels, 4:2:0, its scans laid out anew by `jpegtran -scans`: a scan for each component, and
/// one for the brightness and one for both colours with a restart marker behind every block.
#[test]
fn a_sequential_picture_may_come_in_several_scans() {
    let of = |file: &[u8]| decode(file, Pixels::Hf).unwrap();
    let one = of(include_bytes!("scans/one.jpg"));
    assert_eq!((one.width, one.height), (21, 19));
    for several in
        [&include_bytes!("scans/three.jpg")[..], include_bytes!("scans/two_restarts.jpg")]
    {
        let several = of(several);
        assert_eq!(several, one, "{}", difference(&several, &one));
    }
}

#[test]
fn a_lost_end_marker_is_forgiven_only_when_the_picture_is_whole() {
    let golden = golden();
    let file = bytes(&golden["file/jpeg_420_q95"]);
    let whole = decode(&file, Pixels::Hf).unwrap();
    assert_eq!(decode(&file[..file.len() - 2], Pixels::Hf).unwrap(), whole);
    refused("three bytes fewer", &file[..file.len() - 12]);
    let file = bytes(&golden["file/jpeg_420_progressive"]);
    refused("progressive", &file[..file.len() - 2]);
}

#[test]
fn opening_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broken.jpg");
    let message = open(&path, Pixels::Default).unwrap_err().to_string();
    assert!(message.contains("broken.jpg"), "{message}");
    std::fs::write(&path, b"<html>").unwrap();
    let message = open(&path, Pixels::Default).unwrap_err().to_string();
    assert!(message.contains("broken.jpg") && message.contains("HTML"), "{message}");
    std::fs::write(&path, bytes(&golden()["file/png_RGB"])).unwrap();
    assert_eq!(open(&path, Pixels::Default).unwrap().width, 33);
}

#[test]
fn mutated_files_never_panic() {
    let files = files(&golden());
    let mut state = 1u64;
    let mut random = |below: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let begin = Instant::now();
    for round in 0..2000 {
        let (name, file) = &files[round % files.len()];
        let mut file = file.clone();
        for _ in 0..=random(6) {
            // The headers are where the trouble is.
            let reach = if random(2) == 0 { file.len().min(64) } else { file.len() };
            let at = random(reach);
            match random(4) {
                0 => file[at] = random(256) as u8,
                1 => file[at] ^= 1 << random(8),
                2 => file[at] = [0, 255, 1, 127, 128][random(5)],
                _ => drop(file.drain(at..(at + random(9)).min(file.len()))),
            }
            if file.is_empty() {
                break;
            }
        }
        for pixels in [Pixels::Hf, Pixels::Default] {
            match decode(&file, pixels) {
                Ok(picture) => {
                    let size = picture.width as usize * picture.height as usize * 3;
                    assert_eq!(picture.data.len(), size);
                }
                Err(e) => assert!(!e.to_string().contains("decoder failed"), "{name}: {e}"),
            }
        }
    }
    assert!(begin.elapsed() < Duration::from_secs(120), "{:?}", begin.elapsed());
}
