//! The first frame of a GIF to samples.
//!
//! Unpacking is the `gif` crate's; ours is where the frame lies on the canvas and what surrounds it.

use gif::{ColorOutput, DecodeOptions, MemoryLimit};

use super::{Fallible, Kind, Pixels, Raw, Sides, checked};

pub(super) fn decode(bytes: &[u8], pixels: Pixels) -> Fallible<Raw> {
    let mut options = DecodeOptions::new();
    options.set_color_output(ColorOutput::Indexed);
    // Sizes are checked here, before the one buffer is made.
    options.set_memory_limit(MemoryLimit::Unlimited);
    let mut decoder = options.read_info(bytes).map_err(|e| e.to_string())?;
    checked(usize::from(decoder.width()), usize::from(decoder.height()))?;
    let screen = (usize::from(decoder.width()), usize::from(decoder.height()));
    let global = decoder.global_palette().map(<[u8]>::to_vec);
    let frame = decoder.next_frame_info().map_err(|e| e.to_string())?.ok_or("no frame")?;
    let corner = (usize::from(frame.left), usize::from(frame.top));
    let inner = Sides { width: usize::from(frame.width), height: usize::from(frame.height) };
    let palette = frame.palette.clone().or(global).ok_or("no palette")?;
    let transparent = frame.transparent;
    // A frame may reach beyond the canvas, which then grows.
    let width = screen.0.max(corner.0 + inner.width);
    let sides = checked(width, screen.1.max(corner.1 + inner.height))?;
    let mut indices = vec![0; inner.pixels()];
    decoder.read_into_buffer(&mut indices).map_err(|e| e.to_string())?;

    let mut colours = [[0, 0, 0, 255u8]; 256];
    for (entry, colour) in colours.iter_mut().zip(palette.as_chunks::<3>().0) {
        entry[..3].copy_from_slice(colour);
    }
    if let Some(index) = transparent {
        colours[usize::from(index)][3] = 0;
    }
    // Around the frame a viewer sees nothing; PIL sees the transparent entry or else the first.
    let outside = match pixels {
        Pixels::Hf => colours[usize::from(transparent.unwrap_or(0))],
        Pixels::Default => [0; 4],
    };
    let mut canvas = vec![outside; sides.pixels()];
    for (y, row) in indices.chunks_exact(inner.width.max(1)).enumerate() {
        let at = (corner.1 + y) * sides.width + corner.0;
        for (to, &index) in canvas[at..].iter_mut().zip(row) {
            *to = colours[usize::from(index)];
        }
    }
    Ok(Raw { sides, kind: Kind::RgbAlpha, data: canvas.into_flattened() })
}
