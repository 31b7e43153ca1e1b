//! Train-time changes of pictures: random resized crop and mirroring.
//!
//! The crop draws as torchvision's `RandomResizedCrop` does: area and log-uniform aspect ratio, ten tries, then
//! the largest central crop within the ratios. Draws come from (seed, epoch, sample), so a run can be repeated
//! and resumed exactly; the numbers themselves are ours, not torch's.

use blip2::image::Rgb;

use crate::rng::Rng;

/// How training pictures are varied.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Augment {
    /// The side of the result, pixels.
    pub side: u32,
    /// Smallest and largest share of the picture's area that is kept.
    pub scale: (f64, f64),
    /// Smallest and largest width : height of what is kept.
    pub ratio: (f64, f64),
    /// Probability of mirroring.
    pub flip: f64,
}

/// Where a crop's numbers come from.
pub trait Draw {
    /// Uniform in [low, high).
    fn range(&mut self, low: f64, high: f64) -> f64;
    /// Uniform in 0..n.
    fn below(&mut self, n: usize) -> usize;
}

impl Draw for Rng {
    fn range(&mut self, low: f64, high: f64) -> f64 {
        self.range(low, high)
    }

    fn below(&mut self, n: usize) -> usize {
        self.below(n)
    }
}

impl Augment {
    /// The reference's: area 0.5 to 1, ratio 3:4 to 4:3, mirrored half the time.
    pub fn new(side: u32) -> Self {
        Self { side, scale: (0.5, 1.0), ratio: (3.0 / 4.0, 4.0 / 3.0), flip: 0.5 }
    }

    /// The view of sample `index` in `epoch`: `side`×`side`. `may_flip` is the sample's `flip`.
    ///
    /// # Errors
    /// A picture without pixels.
    pub fn apply(
        &self,
        picture: &Rgb,
        seed: u64,
        epoch: u64,
        index: u64,
        may_flip: bool,
    ) -> crate::Result<Rgb> {
        let (w, h) = (picture.width, picture.height);
        if w == 0 || h == 0 {
            return Err(crate::Error::Data(format!("sample {index}: a picture of {w}x{h} pixels")));
        }
        let mut rng = Rng::new(seed, &[epoch, index, 0x0061_7567]);
        let (x, y, cw, ch) = self.crop(w, h, &mut rng);
        // Drawn in any case, so that a sample's crop does not depend on its flip.
        let mirror = rng.chance(self.flip);
        let view = picture.crop(x, y, cw, ch);
        let view = view.resize_bicubic(self.side, self.side);
        Ok(if mirror && may_flip { view.flip_horizontal() } else { view })
    }

    /// A crop (x, y, width, height) of a `w`×`h` picture.
    pub fn crop(&self, w: u32, h: u32, draw: &mut impl Draw) -> (u32, u32, u32, u32) {
        let area = f64::from(w) * f64::from(h);
        let (low, high) = (self.ratio.0.ln(), self.ratio.1.ln());
        for _ in 0..10 {
            let target = area * draw.range(self.scale.0, self.scale.1);
            let ratio = draw.range(low, high).exp();
            // Python rounds halves to even; so does this.
            let cw = (target * ratio).sqrt().round_ties_even() as u32;
            let ch = (target / ratio).sqrt().round_ties_even() as u32;
            if cw > 0 && cw <= w && ch > 0 && ch <= h {
                let y = draw.below((h - ch + 1) as usize) as u32;
                let x = draw.below((w - cw + 1) as usize) as u32;
                return (x, y, cw, ch);
            }
        }
        central(w, h, self.ratio)
    }
}

/// The largest central crop whose ratio is within `ratio`.
fn central(w: u32, h: u32, ratio: (f64, f64)) -> (u32, u32, u32, u32) {
    let own = f64::from(w) / f64::from(h);
    let (cw, ch) = if own < ratio.0 {
        (w, ((f64::from(w) / ratio.0).round_ties_even() as u32).clamp(1, h))
    } else if own > ratio.1 {
        (((f64::from(h) * ratio.1).round_ties_even() as u32).clamp(1, w), h)
    } else {
        (w, h)
    };
    ((w - cw) / 2, (h - ch) / 2, cw, ch)
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::checkpoint::sha256;

    #[derive(Deserialize)]
    struct Golden {
        side: u32,
        cases: Vec<Case>,
    }

    #[derive(Deserialize)]
    struct Case {
        size: [u32; 2],
        scale: (f64, f64),
        ratio: (f64, f64),
        draws: Vec<f64>,
        crop: (u32, u32, u32, u32),
        sha256: String,
    }

    /// Numbers that somebody else has drawn.
    struct Recorded(std::vec::IntoIter<f64>);

    impl Draw for Recorded {
        fn range(&mut self, low: f64, high: f64) -> f64 {
            let drawn = self.0.next().unwrap();
            // They were drawn between limits in f32.
            assert!((low - 1e-6..=high + 1e-6).contains(&drawn), "{drawn} of {low} to {high}");
            drawn
        }

        fn below(&mut self, n: usize) -> usize {
            let drawn = self.0.next().unwrap() as usize;
            assert!(drawn < n);
            drawn
        }
    }

    fn made_up(w: u32, h: u32) -> Rgb {
        let value = |x: u32, y: u32, c: u32| (x * 7 + y * 13 + c * 29 + x * y % 31 * 3) as u8;
        let row = |y| (0..w).flat_map(move |x| (0..3).map(move |c| value(x, y, c)));
        Rgb { width: w, height: h, data: (0..h).flat_map(row).collect() }
    }

    #[test]
    fn crops_and_their_pixels_equal_torchvision() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../golden/crops.json");
        let golden: Golden = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert_eq!(golden.cases.len(), 24);
        for Case { size: [w, h], scale, ratio, draws, crop, sha256: expected } in golden.cases {
            let augment = Augment { side: golden.side, scale, ratio, flip: 0.0 };
            let mut draw = Recorded(draws.into_iter());
            let (x, y, cw, ch) = augment.crop(w, h, &mut draw);
            assert_eq!((x, y, cw, ch), crop, "{w}x{h}, {scale:?}, {ratio:?}");
            assert!(draw.0.next().is_none(), "{w}x{h}: as many draws");
            let view = made_up(w, h).crop(x, y, cw, ch);
            let view = view.resize_bicubic(golden.side, golden.side);
            assert_eq!(sha256(&view.data), expected, "{w}x{h}, {crop:?}");
        }
    }

    #[test]
    fn crops_lie_inside_and_keep_their_share() {
        let augment = Augment::new(224);
        let mut rng = Rng::new(5, &[]);
        let mut mean = 0.0;
        for _ in 0..2000 {
            let (x, y, w, h) = augment.crop(320, 240, &mut rng);
            assert!(x + w <= 320 && y + h <= 240);
            let share = f64::from(w * h) / (320.0 * 240.0);
            assert!((0.49..=1.0).contains(&share), "{share}");
            let ratio = f64::from(w) / f64::from(h);
            assert!((0.74..1.35).contains(&ratio), "{ratio}");
            mean += share / 2000.0;
        }
        assert!((0.62..0.78).contains(&mean), "{mean}");
    }

    #[test]
    fn long_strips_fall_back_to_the_centre() {
        // As torchvision: a 1000x10 picture admits no try; the crop is 13x10 in the middle.
        let augment = Augment::new(224);
        assert_eq!(augment.crop(1000, 10, &mut Rng::new(1, &[])), (493, 0, 13, 10));
        assert_eq!(augment.crop(10, 1000, &mut Rng::new(1, &[])), (0, 493, 10, 13));
    }
}
