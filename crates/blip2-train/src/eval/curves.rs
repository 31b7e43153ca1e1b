//! The loss curves of a `metrics.jsonl` as a picture, for the model card.
//!
//! One panel: each loss part, and their sum if there are several, over the steps; the raw values pale, a running mean
//! strong. Lines are drawn with soft edges by their distance to each pixel; letters are a bitmap font, so that no font of
//! the system is needed. No general plotting.

use std::io::Cursor;
use std::path::Path;

use embedded_graphics::mono_font::ascii::{FONT_9X15, FONT_9X18_BOLD};
use embedded_graphics::mono_font::{MonoFont, MonoTextStyle};
use embedded_graphics::pixelcolor::Rgb888;
use embedded_graphics::prelude::{
    DrawTarget, Drawable, OriginDimensions, Pixel, Point, RgbColor, Size,
};
use embedded_graphics::text::{Alignment, Baseline, Text, TextStyleBuilder};
use image::{Rgb, RgbImage};

use crate::checkpoint::write_atomic;
use crate::log::StepRecord;
use crate::{Error, Result};

const WIDTH: u32 = 1120;
const HEIGHT: u32 = 560;
/// Margins of the panel: left, top, right, bottom.
const MARGINS: (u32, u32, u32, u32) = (84, 52, 24, 64);
const INK: Rgb<u8> = Rgb([40, 44, 52]);
const GRID: Rgb<u8> = Rgb([226, 229, 234]);
/// Colours that stay apart for colour-blind readers (Okabe and Ito), the sum first.
const COLOURS: [Rgb<u8>; 6] = [
    Rgb([50, 50, 50]),
    Rgb([0, 114, 178]),
    Rgb([213, 94, 0]),
    Rgb([0, 158, 115]),
    Rgb([204, 121, 167]),
    Rgb([230, 159, 0]),
];

/// Draws the losses of `records` and writes them to `path` as PNG.
///
/// # Errors
/// [`Error::Data`] as [`plot_losses`]; [`Error::Io`] if the file can't be written.
pub fn write_losses(path: &Path, title: &str, records: &[StepRecord]) -> Result<()> {
    let mut png = Cursor::new(Vec::new());
    let written = plot_losses(title, records)?.write_to(&mut png, image::ImageFormat::Png);
    written.map_err(|e| Error::io(path)(std::io::Error::other(e)))?;
    write_atomic(path, &png.into_inner())
}

/// Draws the losses of `records`: 1120×560 pixels, light background. Skipped steps are left out.
///
/// # Errors
/// [`Error::Data`] if fewer than two steps have a finite loss.
pub fn plot_losses(title: &str, records: &[StepRecord]) -> Result<RgbImage> {
    let series = collect(records);
    if series.iter().all(|s| s.points.len() < 2) {
        return Err(Error::Data(
            "fewer than two steps with a finite loss: no curve to draw".into(),
        ));
    }
    let panel = Panel::around(&series);
    let mut picture = RgbImage::from_pixel(WIDTH, HEIGHT, Rgb([255, 255, 255]));
    axes(&mut picture, &panel, title);
    for one in &series {
        curve(&mut picture, &panel, &one.points, 1.0, 0.28, one.colour);
    }
    for one in &series {
        curve(&mut picture, &panel, &one.smoothed, 2.2, 1.0, one.colour);
    }
    legend(&mut picture, &panel, &series);
    Ok(picture)
}

/// One line of the plot.
struct Series {
    name: String,
    colour: Rgb<u8>,
    /// (step, loss)
    points: Vec<(f64, f64)>,
    smoothed: Vec<(f64, f64)>,
}

fn collect(records: &[StepRecord]) -> Vec<Series> {
    let mut names: Vec<&str> =
        records.iter().flat_map(|r| r.parts.keys().map(String::as_str)).collect();
    names.sort_unstable();
    names.dedup();
    let sum = if names.len() == 1 { names.remove(0) } else { "loss" };
    let value = |record: &StepRecord, name: &str| {
        if name == sum { Some(record.loss) } else { record.parts.get(name).copied() }
    };
    let series = std::iter::once(sum).chain(names).zip(COLOURS.iter().cycle());
    series
        .map(|(name, &colour)| {
            let taken = records.iter().filter(|r| !r.skipped);
            let points = taken.filter_map(|r| Some((r.step as f64, value(r, name)?)));
            let points: Vec<_> = points.filter(|p| p.1.is_finite()).collect();
            Series { name: name.into(), colour, smoothed: running_mean(&points), points }
        })
        .collect()
}

/// Mean over a window of a fiftieth of the run around each point; fewer points are drawn than measured.
fn running_mean(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let reach = points.len() / 100;
    let stride = points.len() / 1000 + 1;
    let mut sums = vec![0.0];
    for (_, y) in points {
        sums.push(sums[sums.len() - 1] + y);
    }
    (0..points.len())
        .step_by(stride)
        .map(|i| {
            let (from, to) = (i.saturating_sub(reach), (i + reach + 1).min(points.len()));
            (points[i].0, (sums[to] - sums[from]) / (to - from) as f64)
        })
        .collect()
}

/// The drawing area and the numbers it shows.
struct Panel {
    steps: (f64, f64),
    losses: (f64, f64),
}

impl Panel {
    /// All steps; losses from 0 to a little above nearly all of them (a spike may leave the panel).
    fn around(series: &[Series]) -> Self {
        let steps = series.iter().flat_map(|s| s.points.iter().map(|p| p.0));
        let (low, high) =
            steps.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), s| (l.min(s), h.max(s)));
        let mut losses: Vec<f64> =
            series.iter().flat_map(|s| s.points.iter().map(|p| p.1)).collect();
        losses.sort_by(f64::total_cmp);
        let most = losses[(losses.len() - 1) * 995 / 1000].max(1e-6);
        let tick = nice_step(most / 6.0);
        Self {
            steps: (low, high.max(low + 1.0)),
            losses: (losses[0].min(0.0), (most / tick).ceil() * tick),
        }
    }

    fn left(&self) -> f64 {
        f64::from(MARGINS.0)
    }

    fn bottom(&self) -> f64 {
        f64::from(HEIGHT - MARGINS.3)
    }

    fn x(&self, step: f64) -> f64 {
        let width = f64::from(WIDTH - MARGINS.0 - MARGINS.2);
        self.left() + (step - self.steps.0) / (self.steps.1 - self.steps.0) * width
    }

    fn y(&self, loss: f64) -> f64 {
        let height = f64::from(HEIGHT - MARGINS.1 - MARGINS.3);
        let clipped = loss.min(self.losses.1 + (self.losses.1 - self.losses.0) * 0.01);
        self.bottom() - (clipped - self.losses.0) / (self.losses.1 - self.losses.0) * height
    }
}

/// 1, 2 or 5 times a power of ten, not below `rough`.
fn nice_step(rough: f64) -> f64 {
    let power = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .iter()
        .map(|m| m * power)
        .find(|s| *s >= rough * 0.999)
        .unwrap_or(10.0 * power)
}

fn axes(picture: &mut RgbImage, panel: &Panel, title: &str) {
    let right = f64::from(WIDTH - MARGINS.2);
    let tick = nice_step((panel.losses.1 - panel.losses.0) / 6.0);
    let digits = (-tick.log10().floor()).max(0.0) as usize;
    let first = (panel.losses.0 / tick).ceil() as i64;
    for n in first..=(panel.losses.1 / tick + 1e-9).floor() as i64 {
        let loss = n as f64 * tick;
        let y = panel.y(loss);
        line(picture, (panel.left(), y), (right, y), 1.0, 1.0, GRID);
        text(
            picture,
            &format!("{loss:.digits$}"),
            (panel.left() - 10.0, y),
            Alignment::Right,
            &FONT_9X15,
        );
    }
    let tick = nice_step((panel.steps.1 - panel.steps.0) / 8.0).max(1.0);
    for n in (panel.steps.0 / tick).ceil() as i64..=(panel.steps.1 / tick).floor() as i64 {
        let x = panel.x(n as f64 * tick);
        line(picture, (x, panel.bottom()), (x, panel.bottom() + 6.0), 1.0, 1.0, INK);
        text(
            picture,
            &format!("{}", n * tick as i64),
            (x, panel.bottom() + 18.0),
            Alignment::Center,
            &FONT_9X15,
        );
    }
    let top = f64::from(MARGINS.1);
    line(picture, (panel.left(), panel.bottom()), (right, panel.bottom()), 1.0, 1.0, INK);
    line(picture, (panel.left(), top), (panel.left(), panel.bottom()), 1.0, 1.0, INK);
    text(
        picture,
        "step",
        ((panel.left() + right) / 2.0, panel.bottom() + 44.0),
        Alignment::Center,
        &FONT_9X15,
    );
    text(picture, "loss", (panel.left() - 10.0, top - 22.0), Alignment::Right, &FONT_9X15);
    text(picture, title, (panel.left() + 24.0, top - 23.0), Alignment::Left, &FONT_9X18_BOLD);
}

fn legend(picture: &mut RgbImage, panel: &Panel, series: &[Series]) {
    let widest = series.iter().map(|s| s.name.chars().count()).max().unwrap_or(0) as f64 * 9.0;
    let x = f64::from(WIDTH - MARGINS.2) - widest - 76.0;
    let top = f64::from(MARGINS.1) + 14.0;
    for px in x as u32 - 6..WIDTH - MARGINS.2 - 6 {
        for py in 0..series.len() as u32 * 22 + 6 {
            blend(
                picture,
                i64::from(px),
                top as i64 - 8 + i64::from(py),
                Rgb([255, 255, 255]),
                0.85,
            );
        }
    }
    for (row, one) in series.iter().enumerate() {
        let y = top + row as f64 * 22.0 + 3.0;
        line(picture, (x + 4.0, y), (x + 40.0, y), 3.0, 1.0, one.colour);
        text(picture, &one.name, (x + 52.0, y), Alignment::Left, &FONT_9X15);
    }
    debug_assert!(panel.steps.0 < panel.steps.1);
}

fn curve(
    picture: &mut RgbImage,
    panel: &Panel,
    points: &[(f64, f64)],
    width: f64,
    opacity: f64,
    colour: Rgb<u8>,
) {
    for pair in points.windows(2) {
        let [a, b] = [pair[0], pair[1]].map(|(step, loss)| (panel.x(step), panel.y(loss)));
        line(picture, a, b, width, opacity, colour);
    }
}

/// A straight line; a pixel's share of it is how far its middle lies inside.
fn line(
    picture: &mut RgbImage,
    a: (f64, f64),
    b: (f64, f64),
    width: f64,
    opacity: f64,
    colour: Rgb<u8>,
) {
    let reach = width / 2.0 + 1.0;
    let (left, right) = (a.0.min(b.0) - reach, a.0.max(b.0) + reach);
    let (top, bottom) = (a.1.min(b.1) - reach, a.1.max(b.1) + reach);
    let (dx, dy) = (b.0 - a.0, b.1 - a.1);
    let length_squared = (dx * dx + dy * dy).max(1e-12);
    for y in top.floor() as i64..=bottom.ceil() as i64 {
        for x in left.floor() as i64..=right.ceil() as i64 {
            let (px, py) = (x as f64 + 0.5 - a.0, y as f64 + 0.5 - a.1);
            let along = ((px * dx + py * dy) / length_squared).clamp(0.0, 1.0);
            let distance = (px - along * dx).hypot(py - along * dy);
            blend(picture, x, y, colour, opacity * (width / 2.0 + 0.5 - distance).clamp(0.0, 1.0));
        }
    }
}

fn blend(picture: &mut RgbImage, x: i64, y: i64, colour: Rgb<u8>, share: f64) {
    let inside = (0..i64::from(picture.width())).contains(&x)
        && (0..i64::from(picture.height())).contains(&y);
    if share <= 0.0 || !inside {
        return;
    }
    let pixel = picture.get_pixel_mut(x as u32, y as u32);
    for channel in 0..3 {
        let mixed = f64::from(pixel[channel]) * (1.0 - share) + f64::from(colour[channel]) * share;
        pixel[channel] = mixed.round() as u8;
    }
}

/// Text whose middle line runs through `place`; characters beyond ASCII come out as `?`.
fn text(
    picture: &mut RgbImage,
    words: &str,
    place: (f64, f64),
    alignment: Alignment,
    font: &MonoFont<'_>,
) {
    let ascii: String =
        words.chars().map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' }).collect();
    let style = MonoTextStyle::new(font, Rgb888::new(INK[0], INK[1], INK[2]));
    let layout = TextStyleBuilder::new().alignment(alignment).baseline(Baseline::Middle).build();
    let place = Point::new(place.0.round() as i32, place.1.round() as i32);
    let Ok(_) = Text::with_text_style(&ascii, place, style, layout).draw(&mut Canvas(picture));
}

/// The picture as embedded-graphics sees it.
struct Canvas<'a>(&'a mut RgbImage);

impl OriginDimensions for Canvas<'_> {
    fn size(&self) -> Size {
        Size::new(self.0.width(), self.0.height())
    }
}

impl DrawTarget for Canvas<'_> {
    type Color = Rgb888;
    type Error = std::convert::Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(
        &mut self,
        pixels: I,
    ) -> std::result::Result<(), Self::Error> {
        for Pixel(at, colour) in pixels {
            blend(self.0, at.x.into(), at.y.into(), Rgb([colour.r(), colour.g(), colour.b()]), 1.0);
        }
        Ok(())
    }
}
