//! Near-duplicates and splits: which pictures are the same, and which concepts may be held out.
//!
//! Pictures are compared by a 64-bit difference hash of the picture on white and by a small colour thumbnail.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use image::RgbaImage;

use crate::rng::hash_str;

/// What a picture looks like, for comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look {
    /// Difference hash: bit set where a pixel is darker than its right neighbour (9×8 grey).
    pub hash: u64,
    /// 8×8 mean colours, RGB.
    pub thumb: Vec<u8>,
    /// Fewer than this many bits set or clear: the hash says little (a blank or a plain disc).
    pub plain: bool,
}

/// Means of a `w`×`h` grid over the picture on white.
fn grid(picture: &RgbaImage, w: u32, h: u32) -> Vec<[f32; 3]> {
    let (pw, ph) = picture.dimensions();
    let mut out = Vec::with_capacity((w * h) as usize);
    for y in 0..h {
        for x in 0..w {
            let x1 = ((x + 1) * pw).div_ceil(w).max(x * pw / w + 1).min(pw);
            let y1 = ((y + 1) * ph).div_ceil(h).max(y * ph / h + 1).min(ph);
            let (mut sum, mut n) = ([0f32; 3], 0f32);
            for yy in y * ph / h..y1 {
                for xx in x * pw / w..x1 {
                    let p = picture.get_pixel(xx, yy).0;
                    let a = f32::from(p[3]) / 255.0;
                    for c in 0..3 {
                        sum[c] += f32::from(p[c]) * a + 255.0 * (1.0 - a);
                    }
                    n += 1.0;
                }
            }
            out.push(sum.map(|s| s / n.max(1.0)));
        }
    }
    out
}

/// The look of a picture with at least one pixel.
pub fn look(picture: &RgbaImage) -> Look {
    let cells = grid(picture, 9, 8);
    let grey: Vec<f32> = cells.iter().map(|c| 0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2]).collect();
    let mut hash = 0u64;
    for y in 0..8 {
        for x in 0..8 {
            let darker = grey[y * 9 + x] + 1.0 < grey[y * 9 + x + 1];
            hash = hash << 1 | u64::from(darker);
        }
    }
    let thumb = grid(picture, 8, 8).into_iter().flatten().map(|v| v.round() as u8).collect();
    let ones = hash.count_ones();
    Look { hash, thumb, plain: !(6..=58).contains(&ones) }
}

impl Look {
    /// Bits that differ.
    pub fn distance(&self, other: &Self) -> u32 {
        (self.hash ^ other.hash).count_ones()
    }

    /// Mean absolute difference of the thumbnails, 0..=255.
    pub fn colour_distance(&self, other: &Self) -> f32 {
        let sum: u32 =
            self.thumb.iter().zip(&other.thumb).map(|(&a, &b)| u32::from(a.abs_diff(b))).sum();
        sum as f32 / self.thumb.len().max(1) as f32
    }

    /// The same picture, perhaps saved anew.
    pub fn same(&self, other: &Self) -> bool {
        self.distance(other) <= 2 && self.colour_distance(other) < 3.0
    }

    /// A variant of the same drawing: must not be on both sides of a split.
    pub fn near(&self, other: &Self) -> bool {
        let bits = if self.plain || other.plain { 1 } else { 4 };
        self.distance(other) <= bits && self.colour_distance(other) < 12.0
    }
}

/// Sets that are joined bit by bit.
pub struct UnionFind {
    parent: Vec<usize>,
}

impl UnionFind {
    /// `n` sets of one.
    pub fn new(n: usize) -> Self {
        Self { parent: (0..n).collect() }
    }

    /// The representative of `i`'s set: its smallest member.
    pub fn find(&mut self, i: usize) -> usize {
        let mut root = i;
        while self.parent[root] != root {
            root = self.parent[root];
        }
        let mut at = i;
        while self.parent[at] != root {
            at = std::mem::replace(&mut self.parent[at], root);
        }
        root
    }

    /// Joins the sets of `a` and `b`.
    pub fn join(&mut self, a: usize, b: usize) {
        let (a, b) = (self.find(a), self.find(b));
        self.parent[a.max(b)] = a.min(b);
    }
}

/// A part of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Split {
    /// For training.
    Train,
    /// For choices made while training.
    Val,
    /// For results.
    Test,
}

impl Split {
    /// The prefix of its shards.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Val => "val",
            Self::Test => "test",
        }
    }

    /// All of them.
    pub const ALL: [Self; 3] = [Self::Train, Self::Val, Self::Test];
}

/// One picture, as far as splitting is concerned.
#[derive(Clone, Debug)]
pub struct Item<'a> {
    /// Its concept.
    pub concept: &'a str,
    /// Its head noun.
    pub noun: &'a str,
    /// Never held out, nor are others of its concept.
    pub train_only: bool,
}

/// Assigns concepts to splits. `same_group` lists pairs of items that must stay together (near-duplicates).
///
/// A concept is a whole phrase: "bengal tiger" and "sumatran tiger" are two, with one noun. Groups are
/// concepts joined by near-duplicates; a group goes to one split as a whole. A bare noun ("tiger") stays
/// in train when other concepts share the noun, so that held-out pictures ask for known words in new
/// company; groups whose noun nobody else has are held out rarely, so that the test has unknown
/// nouns too, and large groups (chains of look-alikes) and those with an item for training only never.
pub fn split(items: &[Item<'_>], same_group: &[(usize, usize)], seed: u64) -> Vec<Split> {
    let names: BTreeSet<&str> = items.iter().map(|i| i.concept).collect();
    let number: HashMap<&str, usize> = names.iter().enumerate().map(|(n, c)| (*c, n)).collect();
    let mut sets = UnionFind::new(names.len());
    for &(a, b) in same_group {
        sets.join(number[items[a].concept], number[items[b].concept]);
    }
    // Group → its concepts and nouns; noun → groups.
    let mut concepts: BTreeMap<usize, BTreeSet<&str>> = BTreeMap::new();
    let mut nouns: BTreeMap<usize, BTreeSet<&str>> = BTreeMap::new();
    let mut groups_of_noun: BTreeMap<&str, BTreeSet<usize>> = BTreeMap::new();
    let mut train_only: BTreeSet<usize> = BTreeSet::new();
    for item in items {
        let group = sets.find(number[item.concept]);
        if item.train_only {
            train_only.insert(group);
        }
        concepts.entry(group).or_default().insert(item.concept);
        nouns.entry(group).or_default().insert(item.noun);
        groups_of_noun.entry(item.noun).or_default().insert(group);
    }
    let choose = |group: usize| -> Split {
        let (concepts, nouns) = (&concepts[&group], &nouns[&group]);
        let key = concepts.iter().next().copied().unwrap_or_default();
        let draw = (hash_str(&format!("{seed}/{key}")) >> 11) as f64 / (1u64 << 53) as f64;
        let shared = nouns.iter().all(|n| groups_of_noun[n].len() > 1);
        let bare = concepts.iter().any(|c| nouns.contains(c));
        let (test, val) = match () {
            () if concepts.len() > 4 || train_only.contains(&group) => (0.0, 0.0),
            () if shared && bare => (0.0, 0.0),
            () if shared => (0.17, 0.08),
            () => (0.03, 0.015),
        };
        if draw < test {
            Split::Test
        } else if draw < test + val {
            Split::Val
        } else {
            Split::Train
        }
    };
    items.iter().map(|item| choose(sets.find(number[item.concept]))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn look_alikes_are_found_and_others_are_not() {
        let draw = |shift: u32, red: u8| {
            RgbaImage::from_fn(64, 64, |x, y| {
                let inside = (x + shift).abs_diff(32).pow(2) + y.abs_diff(24).pow(2) < 300;
                image::Rgba(if inside || y > 50 { [red, 40, 40, 255] } else { [0, 0, 0, 0] })
            })
        };
        let (a, b, c) = (look(&draw(0, 200)), look(&draw(0, 201)), look(&draw(20, 60)));
        assert!(a.same(&b) && a.near(&b));
        assert!(!a.same(&c));
    }

    #[test]
    fn groups_stay_together() {
        let words: Vec<String> = (0..600).map(|i| format!("kind{} tiger{}", i, i % 7)).collect();
        let nouns: Vec<String> = (0..600).map(|i| format!("tiger{}", i % 7)).collect();
        let items: Vec<Item<'_>> = words
            .iter()
            .zip(&nouns)
            .map(|(c, n)| Item { concept: c, noun: n, train_only: c == "kind6 tiger6" })
            .collect();
        let pairs: Vec<(usize, usize)> = (0..300).map(|i| (i, i + 300)).collect();
        let splits = split(&items, &pairs, 1);
        for (a, b) in pairs {
            assert_eq!(splits[a], splits[b]);
        }
        // Without the flag its draw sends it to the test split.
        assert_eq!(splits[6], Split::Train);
        let test = splits.iter().filter(|s| **s == Split::Test).count();
        assert!((40..170).contains(&test), "{test}");
    }
}
