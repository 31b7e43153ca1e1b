//! Scenes: one to four cut-outs on a background, with sentences, questions and answers that are true by
//! construction: counts, colours, sizes, left/right/above/below.
//!
//! A scene is a pure function of (key, pool). All its things come from one pool, and a pool belongs to one split.

use image::{RgbImage, RgbaImage};

use super::paint::{self, Background, Shape};
use super::sample::{Meta, QuestionAnswer};
use super::text;
use crate::rng::Rng;

/// A cut-out that scenes may use.
#[derive(Clone, Debug)]
pub struct Sprite {
    /// What it shows, without article: "fire truck".
    pub name: String,
    /// Trimmed, with transparency.
    pub cutout: RgbaImage,
    /// Its colour, when it has one and its name does not say it.
    pub colour: Option<&'static str>,
    /// Its licence.
    pub licence: &'static str,
}

/// The things of one split.
#[derive(Clone, Debug, Default)]
pub struct Pool {
    sprites: Vec<Sprite>,
    /// (name, sprites of that name); sorted by name.
    names: Vec<(String, Vec<usize>)>,
    /// Sprites with a colour.
    coloured: Vec<usize>,
    /// Colours and shapes that go together in this split.
    shapes: Vec<(&'static str, Shape)>,
    /// Pieces of photographed surfaces, and their licence.
    textures: Vec<(RgbImage, &'static str)>,
}

impl Pool {
    /// A pool; scenes are made of shapes alone while it has fewer than eight names.
    pub fn new(
        sprites: Vec<Sprite>,
        shapes: Vec<(&'static str, Shape)>,
        textures: Vec<(RgbImage, &'static str)>,
    ) -> Self {
        let mut names: std::collections::BTreeMap<String, Vec<usize>> = Default::default();
        for (i, sprite) in sprites.iter().enumerate() {
            names.entry(sprite.name.clone()).or_default().push(i);
        }
        let coloured = (0..sprites.len()).filter(|&i| sprites[i].colour.is_some()).collect();
        Self { sprites, names: names.into_iter().collect(), coloured, shapes, textures }
    }

    /// Paints a background, with the licence of the photograph it may be made of: half of those
    /// without a name are pieces of photographed surfaces.
    pub fn ground(
        &self,
        background: Background,
        side: u32,
        rng: &mut Rng,
    ) -> (RgbImage, Option<&'static str>) {
        let photo = background == Background::Blur && rng.chance(0.6);
        match rng.pick(&self.textures) {
            Some((texture, licence)) if photo => {
                (paint::from_texture(texture, side, rng), Some(licence))
            }
            _ => (background.paint(side, rng), None),
        }
    }

    /// How many different things there are, shapes aside.
    pub fn names(&self) -> usize {
        self.names.len()
    }
}

/// A scene and what is said about it.
#[derive(Clone, Debug)]
pub struct Scene {
    /// The picture.
    pub canvas: RgbImage,
    /// Captions, questions, licence.
    pub meta: Meta,
}

/// A thing in a scene.
struct Thing {
    /// Without article or colour: "apple".
    name: String,
    /// The colour a caption may add.
    colour: Option<&'static str>,
    cutout: RgbaImage,
    licence: &'static str,
}

impl Thing {
    /// "red apple"
    fn full(&self) -> String {
        self.colour.map_or_else(|| self.name.clone(), |c| format!("{c} {}", self.name))
    }

    /// "a red apple"
    fn a(&self) -> String {
        text::with_article(&self.full())
    }

    /// "the red apple"
    fn the(&self) -> String {
        format!("the {}", self.full())
    }
}

/// What a scene is about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Topic {
    One,
    Count,
    TwoCounts,
    Beside,
    Above,
    Size,
    Colour,
    Several,
}

const TOPICS: [(Topic, f64); 8] = [
    (Topic::One, 0.14),
    (Topic::Count, 0.22),
    (Topic::TwoCounts, 0.10),
    (Topic::Beside, 0.18),
    (Topic::Above, 0.10),
    (Topic::Size, 0.08),
    (Topic::Colour, 0.12),
    (Topic::Several, 0.06),
];

/// What is said, before the background is added.
struct Said {
    /// Full sentences, the best first.
    captions: Vec<String>,
    qa: Vec<(String, String)>,
    flip: bool,
}

/// A thing's place: centre and longer side, in shares of the canvas.
type Spot = (f64, f64, f64);

/// Composes the scene that `rng` draws from a pool, `side` pixels square.
pub fn compose(mut rng: Rng, pool: &Pool, side: u32) -> Scene {
    let mut draw = rng.uniform();
    let mut topic = Topic::Count;
    for (candidate, share) in TOPICS {
        if draw < share {
            topic = candidate;
            break;
        }
        draw -= share;
    }
    let shapes_only = pool.names.len() < 8 || rng.chance(0.12);
    let maker = Maker { pool, shapes_only };
    let (things, spots, said) = maker.make(topic, &mut rng);
    let background = suitable_background(&things, &mut rng);
    let (mut canvas, ground_licence) = pool.ground(background, side, &mut rng);
    for (thing, spot) in things.iter().zip(&spots) {
        place(&mut canvas, thing, *spot, said.flip, &mut rng);
    }
    let mut meta = describe(&maker, &things, said, background, &mut rng);
    if let Some(licence) = ground_licence
        && !meta.licence.contains(licence)
    {
        meta.licence = format!("{} AND {licence}", meta.licence);
    }
    Scene { canvas, meta }
}

/// A background from which the things stand out.
fn suitable_background(things: &[Thing], rng: &mut Rng) -> Background {
    let means: Vec<[f64; 3]> = things.iter().map(|t| paint::mean_colour(&t.cutout)).collect();
    for _ in 0..8 {
        let background = Background::draw(rng);
        let Background::Plain(name) = background else { return background };
        let ground = paint::COLOURS.iter().find(|(n, _)| *n == name).map_or([255; 3], |(_, v)| *v);
        let clear = means.iter().all(|mean| {
            let gap: f64 = (0..3).map(|c| (mean[c] - f64::from(ground[c])).abs()).sum();
            gap > 110.0
        });
        let said = things.iter().any(|t| t.colour == Some(name) || t.name.contains(name));
        if clear && !said {
            return background;
        }
    }
    Background::Blur
}

fn place(canvas: &mut RgbImage, thing: &Thing, spot: Spot, may_mirror: bool, rng: &mut Rng) {
    let side = f64::from(canvas.width());
    let long = (spot.2 * side).max(12.0) as u32;
    let mut cutout = paint::fit(&thing.cutout, long);
    if may_mirror && rng.chance(0.5) {
        image::imageops::flip_horizontal_in_place(&mut cutout);
    }
    let (w, h) = (f64::from(cutout.width()), f64::from(cutout.height()));
    let x = (spot.0 * side - w / 2.0).clamp(0.0, (side - w).max(0.0));
    let y = (spot.1 * side - h / 2.0).clamp(0.0, (side - h).max(0.0));
    paint::paste(canvas, &cutout, x as i64, y as i64);
}

struct Maker<'a> {
    pool: &'a Pool,
    shapes_only: bool,
}

impl Maker<'_> {
    fn shape(&self, rng: &mut Rng) -> Thing {
        let (colour, shape) =
            rng.pick(&self.pool.shapes).copied().unwrap_or(("red", Shape::Circle));
        let cutout = shape.draw_named(colour, 96, rng);
        Thing { name: shape.name().into(), colour: Some(colour), cutout, licence: "CC0-1.0" }
    }

    /// A thing whose name is none of `not`.
    fn thing(&self, not: &[&str], rng: &mut Rng) -> Thing {
        for attempt in 0..20 {
            let thing = if self.shapes_only {
                self.shape(rng)
            } else {
                let Some((_, sprites)) = rng.pick(&self.pool.names) else { return self.shape(rng) };
                let sprite = &self.pool.sprites[sprites[rng.below(sprites.len())]];
                from_sprite(sprite, false)
            };
            if attempt == 19 || !not.iter().any(|n| confusable(n, &thing.name)) {
                return thing;
            }
        }
        self.shape(rng)
    }

    /// `n` things of one name, mostly the same picture of it.
    fn same(&self, n: usize, not: &[&str], rng: &mut Rng) -> Vec<Thing> {
        let first = self.thing(not, rng);
        if self.shapes_only {
            let (colour, name) = (first.colour, first.name.clone());
            let shape = Shape::ALL.into_iter().find(|s| s.name() == name);
            let again = |rng: &mut Rng| Thing {
                name: name.clone(),
                colour,
                cutout: match (shape, colour) {
                    (Some(shape), Some(colour)) => shape.draw_named(colour, 96, rng),
                    _ => first.cutout.clone(),
                },
                licence: first.licence,
            };
            return (0..n).map(|_| again(rng)).collect();
        }
        let alike = rng.chance(0.6);
        let sprites: &[usize] = self
            .pool
            .names
            .iter()
            .find(|(name, _)| *name == first.name)
            .map_or(&[], |(_, sprites)| sprites.as_slice());
        (0..n)
            .map(|_| match rng.pick(sprites) {
                Some(&i) if !alike => from_sprite(&self.pool.sprites[i], false),
                _ => Thing { cutout: first.cutout.clone(), name: first.name.clone(), ..first },
            })
            .collect()
    }

    fn coloured(&self, rng: &mut Rng) -> Thing {
        match rng.pick(&self.pool.coloured) {
            Some(&i) if !self.shapes_only && rng.chance(0.7) => {
                from_sprite(&self.pool.sprites[i], true)
            }
            _ => self.shape(rng),
        }
    }

    /// A name that is not in the picture.
    fn absent(&self, things: &[Thing], rng: &mut Rng) -> Option<String> {
        for _ in 0..20 {
            let name = if self.shapes_only {
                Shape::ALL[rng.below(Shape::ALL.len())].name().to_owned()
            } else {
                rng.pick(&self.pool.names)?.0.clone()
            };
            if !things.iter().any(|t| confusable(&t.name, &name)) {
                return Some(name);
            }
        }
        None
    }

    fn make(&self, topic: Topic, rng: &mut Rng) -> (Vec<Thing>, Vec<Spot>, Said) {
        match topic {
            Topic::One => {
                let thing = self.thing(&[], rng);
                let size = rng.range(0.5, 0.72);
                let spot = (rng.range(0.4, 0.6), rng.range(0.45, 0.6), size);
                let mut qa = vec![("what is this?".into(), thing.a())];
                qa.push((
                    format!("how many {} are there?", text::plural(&thing.name)),
                    "one".into(),
                ));
                let captions = vec![thing.a()];
                (vec![thing], vec![spot], Said { captions, qa, flip: true })
            }
            Topic::Count => {
                let n = 2 + rng.below(3);
                let things = self.same(n, &[], rng);
                let full = if self.shapes_only { things[0].full() } else { things[0].name.clone() };
                let many = text::plural(&full);
                let n_word = text::number(n);
                let name_many = text::plural(&things[0].name);
                let captions = vec![format!("{n_word} {many}")];
                let mut qa = vec![(format!("how many {name_many} are there?"), n_word.to_owned())];
                qa.push(("what is in the picture?".into(), format!("{n_word} {many}")));
                (things, spots(n, rng), Said { captions, qa, flip: true })
            }
            Topic::TwoCounts => {
                let (n, m) =
                    if rng.chance(0.5) { (2, 1 + rng.below(2)) } else { (1 + rng.below(3), 1) };
                let first = self.same(n, &[], rng);
                let second = self.same(m, &[&first[0].name], rng);
                let say = |things: &[Thing]| match things.len() {
                    1 => things[0].a(),
                    k => format!("{} {}", text::number(k), text::plural(&things[0].full())),
                };
                let (a, b) = (say(&first), say(&second));
                let mut qa = Vec::new();
                for group in [&first, &second] {
                    let many = text::plural(&group[0].name);
                    qa.push((
                        format!("how many {many} are there?"),
                        text::number(group.len()).into(),
                    ));
                }
                let captions = vec![format!("{a} and {b}"), format!("{b} and {a}")];
                let things: Vec<Thing> = first.into_iter().chain(second).collect();
                let spots = spots(things.len(), rng);
                (things, spots, Said { captions, qa, flip: true })
            }
            Topic::Beside | Topic::Above => {
                let first = self.thing(&[], rng);
                let second = self.thing(&[&first.name], rng);
                let beside = topic == Topic::Beside;
                let (one, other) =
                    if beside { ("to the left of", "to the right of") } else { ("above", "below") };
                let size = rng.range(0.3, 0.42);
                let spots = if beside {
                    let (y1, y2) = (rng.range(0.42, 0.62), rng.range(0.42, 0.62));
                    vec![(rng.range(0.2, 0.28), y1, size), (rng.range(0.72, 0.8), y2, size)]
                } else {
                    let (x1, x2) = (rng.range(0.4, 0.6), rng.range(0.4, 0.6));
                    vec![(x1, rng.range(0.2, 0.27), size), (x2, rng.range(0.73, 0.8), size)]
                };
                let forward = format!("{} {one} {}", first.a(), second.a());
                let back = format!("{} {other} {}", second.a(), first.a());
                let plain = format!("{} and {}", first.a(), second.a());
                let captions = if rng.chance(0.5) {
                    vec![forward, back, plain]
                } else {
                    vec![back, forward, plain]
                };
                let mut qa = vec![
                    (format!("what is {one} {}?", second.the()), first.a()),
                    (format!("what is {other} {}?", first.the()), second.a()),
                ];
                let truth = rng.chance(0.5);
                let word = if truth { one } else { other };
                let question = format!("is {} {word} {}?", first.the(), second.the());
                qa.push((question, if truth { "yes" } else { "no" }.into()));
                (vec![first, second], spots, Said { captions, qa, flip: !beside })
            }
            Topic::Size => {
                let alike = rng.chance(0.4);
                let mut things = if alike { self.same(2, &[], rng) } else { Vec::new() };
                if !alike {
                    let first = self.thing(&[], rng);
                    let second = self.thing(&[&first.name], rng);
                    things = vec![first, second];
                }
                let (big, small) = (rng.range(0.46, 0.54), rng.range(0.17, 0.23));
                let left = rng.chance(0.5);
                let x = if left { (0.3, 0.8) } else { (0.7, 0.2) };
                let spots =
                    vec![(x.0, rng.range(0.45, 0.6), big), (x.1, rng.range(0.35, 0.72), small)];
                let (b, s) = (
                    format!("a big {}", things[0].full()),
                    format!("a small {}", things[1].full()),
                );
                let captions = vec![format!("{b} and {s}"), format!("{s} and {b}")];
                let mut qa = Vec::new();
                if alike {
                    let many = text::plural(&things[0].name);
                    qa.push((format!("how many {many} are there?"), "two".into()));
                } else {
                    let (one, two) = (things[0].the(), things[1].the());
                    let (p, q) = if rng.chance(0.5) { (&one, &two) } else { (&two, &one) };
                    qa.push((format!("which is bigger, {p} or {q}?"), one.clone()));
                    qa.push((format!("which is smaller, {p} or {q}?"), two.clone()));
                    let ask_first = rng.chance(0.5);
                    let (asked, size) = if ask_first { (&one, "big") } else { (&two, "small") };
                    qa.push((format!("is {asked} big or small?"), size.into()));
                }
                (things, spots, Said { captions, qa, flip: true })
            }
            Topic::Colour => {
                let first = self.coloured(rng);
                let colour = first.colour.unwrap_or("gray");
                let question = format!("what color is the {}?", first.name);
                let mut qa = vec![(question, colour.to_owned())];
                if rng.chance(0.5) {
                    let spot = (rng.range(0.4, 0.6), rng.range(0.42, 0.58), rng.range(0.45, 0.65));
                    let captions = vec![first.a()];
                    qa.push(("what is this?".into(), first.a()));
                    return (vec![first], vec![spot], Said { captions, qa, flip: true });
                }
                let mut second = self.coloured(rng);
                for _ in 0..12 {
                    let clear =
                        !confusable(&second.name, &first.name) && second.colour != first.colour;
                    if clear {
                        break;
                    }
                    second = self.coloured(rng);
                }
                if confusable(&second.name, &first.name) {
                    let captions = vec![first.a()];
                    return (vec![first], vec![(0.5, 0.5, 0.5)], Said { captions, qa, flip: true });
                }
                if let Some(colour) = second.colour {
                    qa.push((format!("what color is the {}?", second.name), colour.to_owned()));
                }
                let (a, b) = (first.a(), second.a());
                let captions = vec![format!("{a} and {b}"), format!("{b} and {a}")];
                (vec![first, second], spots(2, rng), Said { captions, qa, flip: true })
            }
            Topic::Several => {
                let n = 3 + rng.below(2);
                let mut things: Vec<Thing> = Vec::new();
                for _ in 0..n {
                    let names: Vec<&str> = things.iter().map(|t| t.name.as_str()).collect();
                    let next = self.thing(&names, rng);
                    if !names.iter().any(|name| confusable(name, &next.name)) {
                        things.push(next);
                    }
                }
                let all: Vec<String> = things.iter().map(Thing::a).collect();
                let captions = vec![text::list(&all)];
                let spots = spots(things.len(), rng);
                let qa = vec![(
                    "how many things are there?".into(),
                    text::number(things.len()).to_owned(),
                )];
                (things, spots, Said { captions, qa, flip: true })
            }
        }
    }
}

fn from_sprite(sprite: &Sprite, say_colour: bool) -> Thing {
    Thing {
        name: sprite.name.clone(),
        colour: sprite.colour.filter(|_| say_colour),
        cutout: sprite.cutout.clone(),
        licence: sprite.licence,
    }
}

/// Would a question about one also fit the other? Same head noun, or one name inside the other.
fn confusable(a: &str, b: &str) -> bool {
    let last = |s: &str| s.rsplit(' ').next().unwrap_or_default().to_owned();
    last(a) == last(b) || a.contains(b) || b.contains(a)
}

/// Places for `n` things that don't touch.
fn spots(n: usize, rng: &mut Rng) -> Vec<Spot> {
    let size = match n {
        0 | 1 => rng.range(0.5, 0.65),
        2 => rng.range(0.34, 0.44),
        3 => rng.range(0.27, 0.32),
        _ => rng.range(0.27, 0.38),
    };
    let row = n <= 3 && rng.chance(0.5);
    let mut places: Vec<(f64, f64)> = if n <= 1 {
        vec![(0.5, 0.5)]
    } else if row {
        (0..n).map(|i| ((i as f64 + 0.5) / n as f64, 0.52)).collect()
    } else {
        vec![(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)]
    };
    rng.shuffle(&mut places);
    places.truncate(n.max(1));
    let free = ((if row { 1.0 / n as f64 } else { 0.46 }) - size).max(0.0) / 2.0;
    places
        .into_iter()
        .map(|(x, y)| {
            let up = if row { 0.1 } else { free };
            (x + rng.range(-free, free), y + rng.range(-up, up), size * rng.range(0.88, 1.0))
        })
        .collect()
}

fn describe(
    maker: &Maker<'_>,
    things: &[Thing],
    mut said: Said,
    background: Background,
    rng: &mut Rng,
) -> Meta {
    let short = said.captions.clone();
    let mut captions = Vec::new();
    if let Some(place) = background.phrase() {
        captions.extend(said.captions.iter().map(|c| format!("{c} {place}")));
        if let Background::Plain(colour) = background {
            said.qa.push(("what color is the background?".into(), colour.to_owned()));
        } else if things.len() == 1 {
            said.qa.push((format!("where is the {}?", things[0].name), place));
        }
    }
    captions.extend(short);
    // Is there a …? As often yes as no.
    let asked = if rng.chance(0.5) {
        Some((things[rng.below(things.len())].name.clone(), "yes"))
    } else {
        maker.absent(things, rng).map(|name| (name, "no"))
    };
    if let Some((name, answer)) = asked {
        said.qa.push((format!("is there {}?", text::with_article(&name)), answer.into()));
    }
    let mut licences: Vec<&str> = things.iter().map(|t| t.licence).collect();
    licences.sort_unstable();
    licences.dedup();
    let mut names: Vec<String> = things.iter().map(Thing::full).collect();
    names.sort();
    names.dedup();
    let to_qa = |(question, answer): (String, String)| QuestionAnswer { question, answer };
    Meta {
        caption: captions.first().cloned().unwrap_or_default(),
        captions,
        qa: said.qa.into_iter().map(to_qa).collect(),
        concept: names.join(" + "),
        source: if maker.shapes_only { "shapes" } else { "scene" }.into(),
        licence: licences.join(" AND "),
        image_id: None,
        noun: Some(text::head_noun(&things[0].name)),
        flip: said.flip,
    }
}
