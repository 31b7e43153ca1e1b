//! The measuring half of evaluation against its references, and the files a run writes about itself.
//!
//! `golden/metrics.json` and `golden/caption_words.json` were made by pycocoevalcap 1.2 (see the scripts beside them).
//! With `BLIP2_KEEP_TEST_OUTPUT=FOLDER` set while compiling, the page, the pictures and the event files stay there.

#![expect(clippy::unwrap_used, reason = "helpers of tests outside #[test] functions")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use blip2_train::eval::answers::{
    answers_match, names_noun, normalise_answer, plural, vqa_accuracy,
};
use blip2_train::eval::curves::{plot_losses, write_losses};
use blip2_train::eval::metrics::{Item, score_captions};
use blip2_train::eval::ptb;
use blip2_train::eval::report::{
    Accuracy, CaptionRow, Counts, PictureRow, QuestionRow, Report, RetrievalReport, System,
    SystemScores, thumbnail,
};
use blip2_train::eval::retrieval::{ScoreMatrix, chance, evaluate, rerank};
use blip2_train::log::{MetricsLog, Progress, StepRecord, progress_line, read_metrics};
use blip2_train::tensorboard::{Event, EventWriter, What, record};
use serde_json::Value;

fn golden(name: &str) -> Value {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(name);
    serde_json::from_slice(
        &std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())),
    )
    .unwrap()
}

/// Where a person wants to look at what the tests make.
fn kept(name: &str) -> Option<PathBuf> {
    option_env!("BLIP2_KEEP_TEST_OUTPUT").map(|folder| PathBuf::from(folder).join(name))
}

fn string(value: &Value) -> &str {
    value.as_str().unwrap()
}

fn strings(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(string).collect()
}

// ---- tokens ----------------------------------------------------------------------------------

/// Every text whose words differ from the Java program's, as a readable list.
fn differences<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let differs = |(text, theirs): (&str, &str)| {
        let ours = ptb::words(text).join(" ");
        (ours != theirs).then(|| format!("{text:?}\n  theirs {theirs:?}\n  ours   {ours:?}\n"))
    };
    pairs.into_iter().filter_map(differs).collect()
}

#[test]
fn words_are_those_of_the_java_tokenizer() {
    let golden = golden("metrics.json");
    let list = golden["tokenizer"].as_array().unwrap();
    assert_eq!(differences(list.iter().map(|t| (string(&t["text"]), string(&t["tokens"])))), "");
}

#[test]
fn words_of_awkward_captions_are_those_of_the_java_tokenizer() {
    let golden = golden("caption_words.json");
    let list = golden["captions"].as_array().unwrap();
    assert_eq!(list.len(), 400);
    assert_eq!(differences(list.iter().map(|t| (string(&t[0]), string(&t[1])))), "");
}

#[test]
fn tokenizing_never_fails_and_never_depends_on_outer_blanks() {
    // Any mixture of characters, from a fixed little generator.
    let alphabet: Vec<char> = "ab'T.-/&#@<>()\"’“½$5, :;!?\u{ad}\u{0}\n😀é_*%".chars().collect();
    let mut state = 1u32;
    for _ in 0..20_000 {
        let mut text = String::new();
        for _ in 0..12 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            text.push(alphabet[(state >> 16) as usize % alphabet.len()]);
        }
        let words = ptb::words(&text);
        assert!(
            words.iter().all(|w| !w.is_empty() && !w.contains([' ', '\n'])),
            "{text:?}: {words:?}"
        );
        assert_eq!(words, ptb::words(&format!("  {text}\n")), "{text:?}");
    }
}

// ---- caption scores --------------------------------------------------------------------------

#[test]
fn caption_scores_are_those_of_pycocoevalcap() {
    let golden = golden("metrics.json");
    for corpus in golden["corpora"].as_array().unwrap() {
        let list = corpus["items"].as_array().unwrap();
        let items: Vec<Item> = list
            .iter()
            .map(|i| Item::new(string(&i["hypothesis"]), &strings(&i["references"])))
            .collect();
        let scores = score_captions(&items).unwrap();
        let name = string(&corpus["name"]);
        let close = |what: &str, ours: f64, theirs: &Value| {
            let theirs = theirs.as_f64().unwrap();
            assert!((ours - theirs).abs() < 1e-6, "{name} {what}: {ours} and {theirs}");
        };
        for (what, ours, theirs) in std::iter::once(("all".to_string(), scores.corpus, corpus))
            .chain(
                list.iter()
                    .enumerate()
                    .map(|(i, item)| (format!("item {i}"), scores.items[i], item)),
            )
        {
            close(&what, ours.rouge_l, &theirs["rouge_l"]);
            close(&what, ours.cider_d, &theirs["cider_d"]);
            for n in 0..4 {
                close(&format!("{what} BLEU-{}", n + 1), ours.bleu[n], &theirs["bleu"][n]);
            }
        }
    }
}

#[test]
fn caption_scores_refuse_what_cannot_be_scored() {
    assert!(score_captions(&[]).unwrap_err().to_string().contains("no captions"));
    let lonely = [Item::new("a cat", &["a cat"]), Item::new::<&str>("a dog", &[])];
    assert!(score_captions(&lonely).unwrap_err().to_string().contains("caption 1"));
    let empty = [Item::new("", &["a cat"]), Item::new("a dog", &["a dog"])];
    let scores = score_captions(&empty).unwrap();
    assert_eq!((scores.items[0].rouge_l, scores.items[0].cider_d), (0.0, 0.0));
}

// ---- answers and nouns -----------------------------------------------------------------------

#[test]
fn answers_are_normalised_as_by_the_vqa_evaluation() {
    // Made by LAVIS 1.0.2's VQAEval: processPunctuation, then processDigitArticle.
    for (answer, expected) in [
        ("Two dogs.", "2 dogs"),
        ("A man, a woman", "man woman"),
        ("1,000 people", "1000 people"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("it's a cat", "it's cat"),
        ("its", "its"),
        ("dont know", "don't know"),
        ("3.5 m", "3.5 m"),
        ("3. 5", "3 5"),
        ("none", "0"),
        ("self-service", "self service"),
        ("\"hello\"", "hello"),
        ("what? ever", "what ever"),
        ("left;right", "left right"),
        ("a.b.c", "abc"),
        ("TEN", "10"),
        ("somebody'd", "somebodyd"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("oclock", "o'clock"),
        ("yall'll", "y'all'll"),
        ("The", ""),
        ("", ""),
        ("  two\tcats\n", "2 cats"),
        ("5,6", "56"),
        ("5, 6", "5 6"),
        ("left (side)", "left side"),
        ("5:30", "5:30"),
        ("100%", "100%"),
        ("1,234,567.89", "1234567.89"),
        ("to the left of the dog", "to left of dog"),
        ("hes", "he's"),
        ("shes", "shes"),
        ("twas", "'twas"),
        ("im", "im"),
        ("wed", "wed"),
        ("id've", "id've"),
    ] {
        assert_eq!(normalise_answer(answer), expected, "{answer:?}");
    }
    assert!(
        answers_match("Three.", "3")
            && answers_match("the Left", "left")
            && !answers_match("left", "right")
    );
}

#[test]
fn vqa_accuracy_is_that_of_lavis() {
    let cases: [(&str, &str, f64); 4] = [
        ("red", "red no two no cat cat cat 2. blue no", 0.3),
        ("yes", "yes 2. 2. yes cat two blue no 2 yes", 0.9),
        ("red", "yes dog yes 2. blue 2. yes dog blue cat", 0.0),
        ("yes", "dog blue 2 blue blue cat two yes 2. dog", 0.3),
    ];
    for (predicted, truths, expected) in cases {
        let truths: Vec<&str> = truths.split(' ').collect();
        assert!(
            (vqa_accuracy(predicted, &truths) - expected).abs() < 1e-9,
            "{predicted} {truths:?}"
        );
    }
    assert_eq!(vqa_accuracy::<&str>("yes", &[]), 0.0);
}

#[test]
fn nouns_are_found_in_either_number_and_by_near_words() {
    for (caption, noun) in [
        ("a photo of a dog", "dog"),
        ("Two dogs.", "dog"),
        ("a dog", "dogs"),
        ("a puppy on grass", "dog"),
        ("two kittens", "cat"),
        ("three mice", "mouse"),
        ("children playing", "child"),
        ("some cookies", "cookie"),
        ("a firetruck", "fire truck"),
        ("a fire-engine", "fire truck"),
        ("two fire trucks", "fire truck"),
        ("two buses", "bus"),
        ("a bus", "buses"),
        ("a bike", "Bicycle"),
        ("a box of foxes", "fox"),
        ("cherries", "cherry"),
        ("scissors", "scissors"),
        ("a pair of spectacles", "glasses"),
        ("a dog's bone", "dog"),
    ] {
        assert!(names_noun(caption, noun), "{caption:?} names {noun:?}");
    }
    for (caption, noun) in [
        ("a cat", "dog"),
        ("a dogma", "dog"),
        ("hot", "hot dog"),
        ("a truck on fire", "fire truck"),
        ("a hot red dog", "hot dog"),
        ("", "dog"),
        ("a dog", ""),
        ("an animal", "dog"),
    ] {
        assert!(!names_noun(caption, noun), "{caption:?} does not name {noun:?}");
    }
    let plurals = ["fireman", "human", "fly", "toy", "church", "leaf"].map(plural);
    assert_eq!(plurals.join(" "), "firemen humans flies toys churches leaves");
}

// ---- retrieval -------------------------------------------------------------------------------

#[test]
fn recalls_and_ranks_with_several_captions() {
    // 3 pictures, 5 texts; texts 0 and 1 belong to picture 0, 2 to 1, 3 and 4 to 2.
    let owners = [0, 0, 1, 2, 2];
    #[rustfmt::skip]
    let scores = vec![
        0.1, 0.9, 0.5, 0.2, 0.3, // best own text: first
        0.8, 0.7, 0.6, 0.5, 0.4, // own text third
        0.9, 0.8, 0.7, 0.6, 0.5, // best own text fourth
    ];
    let sims = ScoreMatrix::new(3, 5, scores).unwrap();
    let found = evaluate(&sims, &sims.transposed(), &owners).unwrap();
    let i2t = found.image_to_text;
    assert_eq!((i2t.r1, i2t.r5, i2t.r10), (1.0 / 3.0, 1.0, 1.0));
    assert!((i2t.mean_rank - (1.0 + 3.0 + 4.0) / 3.0).abs() < 1e-12);
    assert_eq!(i2t.median_rank, 3.0);
    // Texts: 0 → picture 0 is third; 1 → first; 2 → second; 3 and 4 → first.
    let t2i = found.text_to_image;
    assert_eq!((t2i.r1, t2i.mean_rank, t2i.median_rank), (3.0 / 5.0, 8.0 / 5.0, 1.0));
}

#[test]
fn equal_scores_find_nothing() {
    let sims = ScoreMatrix::new(20, 20, vec![0.5; 400]).unwrap();
    let owners: Vec<usize> = (0..20).collect();
    let found = evaluate(&sims, &sims.transposed(), &owners).unwrap();
    assert_eq!((found.text_to_image.r10, found.text_to_image.mean_rank), (0.0, 20.0));
}

#[test]
fn reranking_reorders_the_best_and_leaves_the_rest_behind() {
    let sims = ScoreMatrix::new(1, 4, vec![0.9, 0.8, 0.7, 0.6]).unwrap();
    let scored = rerank(&sims, 2, |query, candidates| {
        assert_eq!((query, candidates), (0, &[0, 1][..]));
        Ok(vec![-3.0, 4.0])
    })
    .unwrap();
    assert_eq!(scored.top(0, 4), [1, 0, 2, 3]);
    assert_eq!(scored.row(0)[1], 4.0 + 0.8);
    assert_eq!(scored.row(0)[2], -100.0);
    let short = rerank(&sims, 2, |_, _| Ok(vec![1.0])).unwrap_err();
    assert!(short.to_string().contains("1 matching scores for 2"));
    assert!(rerank(&sims, 9, |_, c| Ok(vec![0.0; c.len()])).is_ok());
}

#[test]
fn chance_is_what_random_scores_get() {
    let (images, owners) = (30, (0..60).map(|t| t / 2).collect::<Vec<usize>>());
    let expected = chance(images, &owners).unwrap();
    assert!((expected.text_to_image.r5 - 5.0 / 30.0).abs() < 1e-12);
    let mut state = 7u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 40) as f32
    };
    let (mut r5, mut mean_rank) = (0.0, 0.0);
    for _ in 0..200 {
        let sims = ScoreMatrix::new(30, 60, (0..1800).map(|_| random()).collect()).unwrap();
        let found = evaluate(&sims, &sims.transposed(), &owners).unwrap().image_to_text;
        r5 += found.r5 / 200.0;
        mean_rank += found.mean_rank / 200.0;
    }
    assert!((r5 - expected.image_to_text.r5).abs() < 0.02, "{r5} {expected:?}");
    assert!((mean_rank - expected.image_to_text.mean_rank).abs() < 0.5, "{mean_rank} {expected:?}");
}

#[test]
fn retrieval_refuses_shapes_that_do_not_fit() {
    assert!(
        ScoreMatrix::new(2, 2, vec![0.0; 3])
            .unwrap_err()
            .to_string()
            .contains("3 scores for 2 queries × 2")
    );
    assert!(
        ScoreMatrix::new(1, 2, vec![0.0, f32::NAN])
            .unwrap_err()
            .to_string()
            .contains("candidate 1")
    );
    let sims = ScoreMatrix::new(2, 2, vec![0.0; 4]).unwrap();
    assert!(
        evaluate(&sims, &sims, &[0, 2])
            .unwrap_err()
            .to_string()
            .contains("text 1 belongs to picture 2")
    );
    assert!(
        evaluate(&sims, &sims, &[0, 0]).unwrap_err().to_string().contains("picture 1 has no text")
    );
}

// ---- report ----------------------------------------------------------------------------------

fn example_picture() -> image::RgbImage {
    image::RgbImage::from_fn(320, 200, |x, y| {
        let inside = (f64::from(x) - 160.0).hypot(f64::from(y) - 100.0) < 70.0;
        if inside {
            image::Rgb([200, (x / 2) as u8, (y / 2) as u8])
        } else {
            image::Rgb([250, 250, 250])
        }
    })
}

fn example_scores(system: System, cider: f64, right: usize) -> SystemScores {
    let accuracy = |right, total| Accuracy { right, total };
    let kinds =
        [("colour".to_string(), accuracy(right, 50)), ("count".to_string(), accuracy(right, 50))];
    SystemScores {
        system,
        cider,
        bleu4: cider / 5.0,
        rouge_l: 0.3,
        noun_accuracy: accuracy(right, 40),
        question_accuracy: accuracy(right * 2, 100),
        question_kinds: BTreeMap::from(kinds),
    }
}

fn example_row(key: &str, reference: &str) -> PictureRow {
    let caption = |text: &str, cider, names_noun| CaptionRow {
        text: text.into(),
        cider,
        rouge_l: 0.4,
        names_noun,
    };
    PictureRow {
        key: key.into(),
        thumbnail: Some(thumbnail(&example_picture(), 176).unwrap()),
        references: vec![reference.into(), "a big round thing on a plain background".into()],
        noun: Some("ball".into()),
        captions: BTreeMap::from([
            (System::Model, caption("a red ball on a white background", 1.234, Some(true))),
            (System::NearestNeighbour, caption("an orange", 0.2, Some(false))),
            (System::Blind, caption("", 0.0, Some(false))),
        ]),
        questions: vec![QuestionRow {
            question: "What colour is the ball?".into(),
            kind: "colour".into(),
            truth: "red".into(),
            answers: BTreeMap::from([
                (System::Model, ("red".into(), true)),
                (System::NearestNeighbour, ("blue".into(), false)),
                (System::Blind, ("green & <i>more</i>".into(), false)),
            ]),
        }],
    }
}

fn example_report() -> Report {
    let sims = ScoreMatrix::new(3, 3, vec![0.9, 0.1, 0.2, 0.3, 0.8, 0.1, 0.7, 0.1, 0.6]).unwrap();
    let itc = evaluate(&sims, &sims.transposed(), &[0, 1, 2]).unwrap();
    let chance = chance(3, &[0, 1, 2]).unwrap();
    Report {
        model: "mini".into(),
        model_hash: "0123456789abcdef".repeat(4),
        split: "test".into(),
        data_hash: "fedcba9876543210".repeat(4),
        version: "0.1.0".into(),
        counts: Counts { pictures: 3, references: 6, nouns: 3, questions: 3 },
        decode: BTreeMap::from([
            ("num_beams".into(), 3.into()),
            ("prompt".into(), "a photo of".into()),
        ]),
        notes: vec!["warning: 1 of 4 samples can't be used".into()],
        systems: vec![
            example_scores(System::Model, 0.81, 30),
            SystemScores {
                question_kinds: BTreeMap::new(),
                question_accuracy: Accuracy::default(),
                ..example_scores(System::FirstStage, 0.6, 0)
            },
            example_scores(System::NearestNeighbour, 0.4, 12),
            example_scores(System::Blind, 0.05, 2),
        ],
        retrieval: Some(RetrievalReport {
            pictures: 3,
            texts: 3,
            itc,
            itc_itm: Some(itc),
            k_test: 128,
            chance,
        }),
        seconds: 71.3,
        pictures: vec![
            example_row("stamps/0001", "a red ball"),
            example_row("<script>alert(1)</script>", "caption \"quoted\" & <b>bold</b>'s"),
        ],
    }
}

#[test]
fn report_as_text_json_and_page() {
    let report = example_report();
    let text = report.to_text();
    for part in [
        "nearest neighbour",
        "noun %",
        "81.0",
        "75.0",
        "colour",
        "ITC + ITM",
        "text → image",
        "num_beams 3",
        "1 of 4 samples can't be used",
    ] {
        assert!(text.contains(part), "{part:?} in\n{text}");
    }
    // The first stage answers nothing: it has a line among the scores, and no column among the answers.
    assert_eq!(text.matches("first stage").count(), 1, "{text}");
    let json = report.to_json().unwrap();
    assert!(!json.contains("data:image"));
    let mut back: Report = serde_json::from_str(&json).unwrap();
    for (back, row) in back.pictures.iter_mut().zip(&report.pictures) {
        back.thumbnail.clone_from(&row.thumbnail);
    }
    assert_eq!(back, report);
    let page = report.to_html();
    if let Some(path) = kept("report.html") {
        std::fs::write(path, &page).unwrap();
        std::fs::write(kept("report.txt").unwrap(), text).unwrap();
    }
    // No text of the data becomes markup, and nothing is loaded from elsewhere.
    for forbidden in ["<script", "<b>bold", "<i>more", "http:", "https:", "@import", "url("] {
        assert!(!page.contains(forbidden), "{forbidden:?}");
    }
    assert!(page.contains("1 of 4 samples"));
    assert!(page.contains("caption &quot;quoted&quot; &amp; &lt;b&gt;bold&lt;/b&gt;&#39;s"));
    assert_eq!(page.matches("src=\"data:image/jpeg;base64,").count(), 2);
}

#[test]
fn report_without_questions_and_retrieval() {
    let mut report = example_report();
    report.retrieval = None;
    report.pictures.clear();
    for system in &mut report.systems {
        system.question_kinds.clear();
        system.question_accuracy = Accuracy::default();
    }
    assert!(!report.to_text().contains("retrieval") && !report.to_html().contains("R@1"));
    assert!(report.to_text().lines().any(|line| line.ends_with(" -")));
}

#[test]
fn thumbnails_are_small_and_never_empty() {
    let decode = |url: String| {
        use base64::Engine as _;
        let data = url.strip_prefix("data:image/jpeg;base64,").unwrap();
        image::load_from_memory(&base64::engine::general_purpose::STANDARD.decode(data).unwrap())
            .unwrap()
    };
    let wide = decode(thumbnail(&image::RgbImage::new(4000, 3), 160).unwrap());
    assert_eq!((wide.width(), wide.height()), (160, 1));
    let tiny = decode(thumbnail(&image::RgbImage::new(7, 9), 160).unwrap());
    assert_eq!((tiny.width(), tiny.height()), (7, 9));
}

// ---- log, events, curves ---------------------------------------------------------------------

fn step(step: u64) -> StepRecord {
    StepRecord {
        step,
        epoch: step as f64 / 100.0,
        loss: 3.0,
        parts: BTreeMap::from([("itc".into(), 1.5), ("itm".into(), 0.5), ("itg".into(), 1.0)]),
        lr: 1e-4,
        images_per_s: 40.0,
        grad_norm: 2.0,
        skipped: false,
    }
}

#[test]
fn the_log_of_a_resumed_run_tells_one_run() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run/metrics.jsonl");
    let mut log = MetricsLog::open(&path, 0).unwrap();
    for n in 1..=5 {
        log.write(&step(n)).unwrap();
    }
    assert_eq!(read_metrics(&path).unwrap().len(), 5, "every line is flushed as it is written");
    drop(log);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o644, "others may watch");
    }
    // A kill in the middle of a line.
    let mut text = std::fs::read_to_string(&path).unwrap();
    text.push_str("{\"step\":3,\"epo");
    std::fs::write(&path, &text).unwrap();
    assert_eq!(read_metrics(&path).unwrap().len(), 5);

    let first_lines: Vec<String> = text.lines().take(3).map(String::from).collect();
    let mut log = MetricsLog::open(&path, 3).unwrap();
    log.write(&StepRecord { loss: f64::NAN, skipped: true, ..step(4) }).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(
        text.lines().take(3).collect::<Vec<_>>(),
        first_lines,
        "kept lines stand as they were"
    );
    let records = read_metrics(&path).unwrap();
    assert_eq!(records.iter().map(|r| r.step).collect::<Vec<_>>(), [1, 2, 3, 4]);
    assert!(records[3].loss.is_nan() && records[3].skipped);
    assert_eq!(records[0], step(1));
    assert_eq!(
        std::fs::read_dir(path.parent().unwrap()).unwrap().count(),
        1,
        "no temporary file is left"
    );

    drop(MetricsLog::open(&path, 0).unwrap());
    assert_eq!(read_metrics(&path).unwrap(), []);
    std::fs::write(&path, "{\"step\":1}\nnonsense\n").unwrap();
    assert!(read_metrics(&path).unwrap_err().to_string().contains("line 1"));
}

#[test]
fn the_live_line() {
    let line = progress_line(&step(120), 4000, 38.24, Some(Duration::from_secs(761)));
    let losses = "loss 3.000 (itc 1.500 itg 1.000 itm 0.500)";
    assert_eq!(
        line,
        format!("step 120/4000  epoch 1.20  {losses}  lr 1.0e-4  38.2 images/s  ETA 0:12:41")
    );
    let start = Instant::now();
    let show = |terminal| {
        let mut out = Vec::new();
        let mut progress = Progress::new(&mut out, terminal, Duration::from_secs(10), 100);
        for n in 1..=100 {
            progress.update(&step(n), start + Duration::from_secs(n));
        }
        progress.finish();
        String::from_utf8(out).unwrap()
    };
    let plain = show(false);
    assert_eq!(plain.lines().count(), 11, "every ten seconds and at the end:\n{plain}");
    assert!(plain.lines().nth(1).unwrap().contains("ETA 0:01:29") && !plain.contains('\r'));
    let live = show(true);
    assert_eq!((live.matches('\r').count(), live.matches('\n').count()), (100, 1));
}

/// The bytes that the Python package tensorboard 2.21 makes of the same events (`event_pb2.Event`, framed with its
/// `masked_crc32c`).
#[test]
fn event_bytes_are_those_of_tensorboard() {
    let hex = |event: &Event<'_>| {
        record(&event.encode()).iter().map(|b| format!("{b:02x}")).collect::<String>()
    };
    let scalars = What::Scalars(&[("loss", 2.5), ("part/itc", -1.0)]);
    assert_eq!(
        hex(&Event { wall_time: 1.5e9, step: 300, what: scalars }),
        "2c00000000000000f4aecc4509000000c00b5ad64110ac022a1e0a0b0a046c6f737315000020400a0f0a08706172742f69746315000080bf56e6c495"
    );
    assert_eq!(
        hex(&Event { wall_time: 1.0, step: 0, what: What::FileVersion }),
        "1800000000000000a37f4b2209000000000000f03f1a0d627261696e2e4576656e743a3286bf577a"
    );
}

/// The two files of this test were read back with tensorboard 2.21's `EventAccumulator`: `loss` has steps 1 to 15,
/// 1/n up to step 10 and 100 behind it (what the first file held from step 11 on is forgotten), and `part/itc`
/// steps 1 to 10.
#[test]
fn every_start_of_a_run_makes_its_own_event_file() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = kept("events").unwrap_or_else(|| temporary.path().join("events"));
    let mut first = EventWriter::create(&folder, None).unwrap();
    for n in 1..=20 {
        first.scalars(n, &[("loss", 1.0 / n as f32), ("part/itc", n as f32)]).unwrap();
    }
    let mut resumed = EventWriter::create(&folder, Some(11)).unwrap();
    for n in 11..=15 {
        resumed.scalars(n, &[("loss", 100.0)]).unwrap();
    }
    assert_ne!(first.path(), resumed.path());
    // Flushed already: 20 scalars and the version, each framed by 16 bytes.
    let bytes = std::fs::read(first.path()).unwrap();
    let (mut at, mut records) = (0, 0);
    while at < bytes.len() {
        at += 16 + u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        records += 1;
    }
    assert_eq!((at, records), (bytes.len(), 21));
}

/// A made-up run: three parts that fall, noise, one skipped step.
fn example_run() -> Vec<StepRecord> {
    let mut state = 3u32;
    let mut noise = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f64::from(state >> 8) / f64::from(1 << 24) - 0.5
    };
    let mut record = |n: u64| {
        let x = n as f64;
        let itc = 0.8 + 4.0 * (-x / 900.0).exp() + 0.5 * noise();
        let itm = 0.3 + 0.35 * (-x / 1500.0).exp() + 0.1 * noise();
        let itg = 1.4 + 5.0 * (-x / 500.0).exp() + 0.6 * noise();
        let loss = if n == 777 { f64::NAN } else { itc + itm + itg };
        let parts = BTreeMap::from([("itc".into(), itc), ("itm".into(), itm), ("itg".into(), itg)]);
        StepRecord { loss, parts, skipped: n == 777, ..step(n) }
    };
    (1..=4000).map(&mut record).collect()
}

#[test]
fn loss_curves() {
    let records = example_run();
    let picture = plot_losses("mini, stage 1", &records).unwrap();
    assert_eq!((picture.width(), picture.height()), (1120, 560));
    let dark = picture.pixels().filter(|p| p.0.iter().all(|&c| c < 90)).count();
    assert!(dark > 2000, "the sum's line, axes and letters: {dark} pixels");
    let one_part = |r: &StepRecord| StepRecord {
        loss: r.parts["itc"],
        parts: BTreeMap::from([("lm".into(), r.parts["itc"])]),
        ..step(r.step)
    };
    let stage2: Vec<StepRecord> = records.iter().take(333).map(one_part).collect();
    let second = plot_losses("mini, stage 2", &stage2).unwrap();
    if let Some(path) = kept("curves.png") {
        picture.save(path).unwrap();
        second.save(kept("curves2.png").unwrap()).unwrap();
    }
    assert!(plot_losses("", &records[..1]).is_err());
    assert!(plot_losses("", &records[776..777]).is_err());
    assert!(plot_losses("two steps", &records[..2]).is_ok());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("curves.png");
    write_losses(&path, "mini, stage 2", &stage2).unwrap();
    assert_eq!(image::open(&path).unwrap().to_rgb8(), second);
}
