//! What was typed. Parsed to plain data; nothing here touches a model or a file.

use std::path::PathBuf;

use blip2_ops::WeightFormat;
use clap::{Args, Parser, Subcommand, ValueEnum};

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

/// Flags of every verb.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// `mini` (fetched once), or a folder with a model.json
    #[arg(
        long,
        global = true,
        env = "BLIP2_MODEL",
        default_value = "mini",
        value_name = "DIR|mini"
    )]
    pub(crate) model: String,
    /// How frozen and served weights are kept in memory: f32, f16, q8_0, q4_k
    #[arg(long, global = true, env = "BLIP2_WEIGHTS", value_name = "FORMAT")]
    pub(crate) weights: Option<WeightFormat>,
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
    /// Sets the number of threads, and refuses a device that this build has not.
    pub(crate) fn apply(&self) -> anyhow::Result<()> {
        if self.device != DeviceName::Cpu {
            anyhow::bail!("--device {:?}: this build computes on the CPU only", self.device);
        }
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
    /// Write a model folder again, its bridge packed in few bits
    Convert(ConvertArgs),
    /// Make and look at training data
    Data(DataArgs),
    /// Train from a recipe
    Train(TrainArgs),
    /// Measure a model as a recipe says
    Eval(EvalArgs),
}

/// How text is generated.
#[derive(Debug, Clone, Args)]
pub(crate) struct GenerateArgs {
    /// Beams; 1 is greedy
    #[arg(long, env = "BLIP2_NUM_BEAMS", value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=64))]
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
        allow_negative_numbers = true
    )]
    pub(crate) length_penalty: f32,
    /// Above 1 discourages tokens already said
    #[arg(long, env = "BLIP2_REPETITION_PENALTY", value_name = "X", default_value_t = 1.0)]
    pub(crate) repetition_penalty: f32,
    /// Sample from the most likely tokens that together have probability X (instead of beams)
    #[arg(long, env = "BLIP2_TOP_P", value_name = "X")]
    pub(crate) top_p: Option<f32>,
    /// Sample: below 1 sharper, above 1 flatter
    #[arg(long, env = "BLIP2_TEMPERATURE", value_name = "X")]
    pub(crate) temperature: Option<f32>,
    /// Sample: the random numbers to use
    #[arg(long, env = "BLIP2_SEED", value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

/// How pictures are read.
#[derive(Debug, Clone, Args)]
pub(crate) struct PictureArgs {
    /// Pixels exactly as transformers' PIL processor makes them: EXIF orientation ignored, 16-bit clipped
    #[arg(long, env = "BLIP2_HF_PIXELS")]
    pub(crate) hf_pixels: bool,
    /// Pictures computed together
    #[arg(long, env = "BLIP2_BATCH_SIZE", value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) batch_size: u16,
}

#[derive(Debug, Args)]
pub(crate) struct CaptionArgs {
    /// Pictures, folders (searched to the bottom) or patterns like 'photos/*.jpg'
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) images: Vec<PathBuf>,
    /// Text the caption goes on from
    #[arg(long, env = "BLIP2_PROMPT", value_name = "P")]
    pub(crate) prompt: Option<String>,
    /// Captions per picture, best first
    #[arg(long, env = "BLIP2_NUM_CAPTIONS", value_name = "K", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) num_captions: u16,
    #[command(flatten)]
    pub(crate) generate: GenerateArgs,
    #[command(flatten)]
    pub(crate) pictures: PictureArgs,
}

#[derive(Debug, Args)]
pub(crate) struct AskArgs {
    /// A picture
    pub(crate) image: PathBuf,
    /// The question
    pub(crate) question: String,
    /// An earlier turn, as 'question=answer'; may be given several times, oldest first
    #[arg(long, value_name = "Q=A")]
    pub(crate) history: Vec<String>,
    #[command(flatten)]
    pub(crate) generate: GenerateArgs,
    #[command(flatten)]
    pub(crate) pictures: PictureArgs,
}

#[derive(Debug, Args)]
pub(crate) struct MatchArgs {
    /// Pictures, folders or patterns
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) images: Vec<PathBuf>,
    /// A text to score; may be given several times
    #[arg(long, required = true, value_name = "T")]
    pub(crate) text: Vec<String>,
    #[command(flatten)]
    pub(crate) pictures: PictureArgs,
}

#[derive(Debug, Args)]
#[group(skip)]
pub(crate) struct EmbedArgs {
    /// A picture, folder or pattern; may be given several times
    #[arg(long, value_name = "I", required_unless_present = "text")]
    pub(crate) image: Vec<PathBuf>,
    /// A text; may be given several times
    #[arg(long, value_name = "T")]
    pub(crate) text: Vec<String>,
    #[command(flatten)]
    pub(crate) pictures: PictureArgs,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// `mini` or a folder [default: --model]
    pub(crate) name: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// `mini`, or `minilm` (the BERT that training starts from)
    #[arg(default_value = "mini")]
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// A model folder
    pub(crate) from: String,
    /// The folder to write
    pub(crate) to: PathBuf,
    /// What matrices are kept in
    #[arg(long, value_enum, default_value_t = BitsName::Q8)]
    pub(crate) matrices: BitsName,
    /// What word and position embeddings are kept in
    #[arg(long, value_enum, default_value_t = BitsName::Q8)]
    pub(crate) embeddings: BitsName,
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
    #[arg(long, value_name = "DIR", default_value = "runs/mini-data")]
    pub(crate) out: PathBuf,
    /// Folder with the package archives, if they are not to be fetched
    #[arg(long, value_name = "DIR")]
    pub(crate) packages: Option<PathBuf>,
    /// Same seed, same bytes [default: 1]
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Only N drawn shapes, without any package
    #[arg(long, value_name = "N")]
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
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Folder of the run [default: runs/NAME of the recipe]
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Go on from the newest valid checkpoint
    #[arg(long)]
    pub(crate) resume: bool,
}

#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    /// A recipe with an eval part
    pub(crate) recipe: PathBuf,
    /// Change one field of it; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
}
