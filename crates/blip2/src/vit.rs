//! The image encoder: a pre-norm vision transformer. Frozen in both stages of BLIP-2's pre-training.
//!
//! One file serves three published encoders; they differ only in what [`VitConfig`] says:
//!
//! | | EVA-CLIP ViT-g/14 | CLIP ViT-L/14 | DINOv2-style ViT-S/14 |
//! |---|---|---|---|
//! | width, depth, heads | 1408, 39, 16 | 1024, 23, 16 | 384, 11 of 12, 6 |
//! | activation | GELU | QuickGELU | GELU |
//! | norm before the blocks | – | yes | – |
//! | patch bias | yes | – | yes |
//! | layer scale | – | – | yes |
//!
//! The output is the second-last layer's (paper §3.4), un-normalised: `ln_vision` belongs to the bridge.
//! Shapes: b pictures, n = (size / patch)² patches, w width.

use blip2_ops::{Dropout, add};
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use serde::{Deserialize, Serialize};

use crate::nn::{Activation, Attention, Corners, LayerNorm, Linear, Mlp, check_sizes};
use crate::params::Params;
use crate::{Error, Result};

/// Longest side of a picture, and most patches along it: ten times those of any published encoder.
const MOST_PIXELS: usize = 8192;
const MOST_PATCHES: usize = 256;

/// The shape of an image encoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VitConfig {
    /// Side of the square picture, in pixels.
    pub image_size: usize,
    /// Side of a square patch, in pixels.
    pub patch_size: usize,
    /// Features per token.
    pub width: usize,
    /// Blocks, counted without those behind the layer that is read.
    pub depth: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Features inside the feed-forward network.
    pub mlp_width: usize,
    /// Its non-linearity.
    pub activation: Activation,
    /// Epsilon of every layer normalisation.
    pub layer_norm_eps: f64,
    /// Whether the patch projection has a bias.
    pub patch_bias: bool,
    /// Whether a layer normalisation stands before the blocks (CLIP's `ln_pre`).
    pub pre_norm: bool,
    /// Whether each branch is multiplied by learned factors (DINOv2's layer scale).
    pub layer_scale: bool,
}

impl VitConfig {
    /// EVA-CLIP ViT-g/14 without its last block.
    #[must_use]
    pub fn eva_clip_g() -> Self {
        Self {
            image_size: 224,
            patch_size: 14,
            width: 1408,
            depth: 39,
            num_heads: 16,
            mlp_width: 6144,
            activation: Activation::Gelu,
            layer_norm_eps: 1e-6,
            patch_bias: true,
            pre_norm: false,
            layer_scale: false,
        }
    }

    /// CLIP ViT-L/14 without its last block.
    #[must_use]
    pub fn clip_l() -> Self {
        Self {
            width: 1024,
            depth: 23,
            mlp_width: 4096,
            activation: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
            patch_bias: false,
            pre_norm: true,
            ..Self::eva_clip_g()
        }
    }

    /// DINOv2-style ViT-S/14 without its last block.
    #[must_use]
    pub fn dino_s() -> Self {
        Self {
            width: 384,
            depth: 11,
            num_heads: 6,
            mlp_width: 1536,
            layer_scale: true,
            ..Self::eva_clip_g()
        }
    }

    /// Tokens per picture: the class token and the patches.
    #[must_use]
    pub fn num_tokens(&self) -> usize {
        1 + (self.image_size / self.patch_size).pow(2)
    }

    /// How its positions are fitted to another number of patches.
    #[must_use]
    pub fn corners(&self) -> Corners {
        if self.pre_norm { Corners::Centres } else { Corners::Edges }
    }

    /// Refuses what makes no sense, and sizes whose products would overflow or fill the memory: the positions of any picture
    /// are fitted to this one, so the weights say nothing about it.
    ///
    /// # Errors
    /// For the first field out of range, with its number.
    pub fn check(&self) -> Result<()> {
        let sizes = [
            ("image_size", self.image_size),
            ("patch_size", self.patch_size),
            ("width", self.width),
            ("depth", self.depth),
            ("num_heads", self.num_heads),
            ("mlp_width", self.mlp_width),
        ];
        check_sizes("image encoder", &sizes)?;
        let side = self.image_size / self.patch_size;
        if self.image_size > MOST_PIXELS || side > MOST_PATCHES {
            return Err(Error::Config(format!(
                "image_size {} with patch_size {}: at most {MOST_PIXELS} pixels and {MOST_PATCHES} patches a side",
                self.image_size, self.patch_size
            )));
        }
        if !self.image_size.is_multiple_of(self.patch_size) {
            return Err(Error::Config(format!(
                "patch_size {} does not divide image_size {}",
                self.patch_size, self.image_size
            )));
        }
        Ok(())
    }
}

struct Block {
    norm1: LayerNorm,
    attn: Attention,
    scale1: Option<Tensor>,
    norm2: LayerNorm,
    mlp: Mlp,
    scale2: Option<Tensor>,
}

impl Block {
    fn new(params: &Params, config: &VitConfig) -> Result<Self> {
        let (w, eps) = (config.width, config.layer_norm_eps);
        let scale = |name| config.layer_scale.then(|| params.tensor(name, &[w])).transpose();
        Ok(Self {
            norm1: params.pp("norm1").layer_norm(w, eps)?,
            attn: Attention::new(&params.pp("attn"), w, w, config.num_heads, 0.0)?,
            scale1: scale("scale1")?,
            norm2: params.pp("norm2").layer_norm(w, eps)?,
            mlp: Mlp::new(&params.pp("mlp"), w, config.mlp_width, config.activation)?,
            scale2: scale("scale2")?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let attn = self.attn.attend(&self.norm1.forward(x)?, None, &Dropout::off())?;
        let x = add(x, &scaled(attn, self.scale1.as_ref())?)?;
        let mlp = self.mlp.forward(&self.norm2.forward(&x)?)?;
        Ok(add(&x, &scaled(mlp, self.scale2.as_ref())?)?)
    }
}

fn scaled(x: Tensor, scale: Option<&Tensor>) -> Result<Tensor> {
    match scale {
        None => Ok(x),
        Some(scale) => Ok(x.broadcast_mul(scale)?),
    }
}

/// What [`Vit::forward_taped`] leaves for the backward pass.
pub struct Tape {
    pixels: Tensor,
    /// Of each block.
    inputs: Vec<Tensor>,
}

/// A vision transformer: pixels to one feature vector per token.
pub struct Vit {
    config: VitConfig,
    patch_embed: Linear,
    cls_token: Tensor,
    pos_embed: Tensor,
    norm_pre: Option<LayerNorm>,
    blocks: Vec<Block>,
}

impl Vit {
    /// Reads the weights: `patch_embed` (w, 3·patch²), `cls_token` (1, 1, w), `pos_embed` (1, 1 + n, w), `blocks.N.*`.
    ///
    /// # Errors
    /// If the configuration makes no sense; weights that don't fit are reported by [`Params::build`].
    pub fn new(params: &Params, config: &VitConfig) -> Result<Self> {
        config.check()?;
        let w = config.width;
        let pre = params.pp("norm_pre");
        Ok(Self {
            patch_embed: params.pp("patch_embed").linear(
                3 * config.patch_size.pow(2),
                w,
                config.patch_bias,
            )?,
            cls_token: params.tensor("cls_token", &[1, 1, w])?,
            pos_embed: params.tensor("pos_embed", &[1, config.num_tokens(), w])?,
            norm_pre: config
                .pre_norm
                .then(|| pre.layer_norm(w, config.layer_norm_eps))
                .transpose()?,
            blocks: (0..config.depth)
                .map(|i| Block::new(&params.pp("blocks").pp(i), config))
                .collect::<Result<_>>()?,
            config: config.clone(),
        })
    }

    /// The shape this encoder was built with.
    #[must_use]
    pub fn config(&self) -> &VitConfig {
        &self.config
    }

    /// Normalised `pixels` (b, 3, size, size) → features (b, 1 + n, w), class token first.
    ///
    /// # Errors
    /// If the pictures have another size than the encoder.
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let mut x = self.embed(pixels)?;
        for block in &self.blocks {
            x = block.forward(&x)?;
        }
        Ok(x)
    }

    /// [`Self::forward`] that keeps the input of every block and nothing from inside them: for training an encoder whose
    /// activations would not fit. The features carry no gradient; [`Self::backward_taped`] goes on from theirs.
    ///
    /// # Errors
    /// If the pictures have another size than the encoder.
    pub fn forward_taped(&self, pixels: &Tensor) -> Result<(Tensor, Tape)> {
        let mut x = self.embed(pixels)?.detach();
        let mut inputs = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            inputs.push(x.clone());
            x = block.forward(&x)?.detach();
        }
        Ok((x, Tape { pixels: pixels.clone(), inputs }))
    }

    /// The backward pass behind [`Self::forward_taped`]: `grad` (b, 1 + n, w) is the gradient of the features. Each block is
    /// computed again and taken back alone, last one first; `keep` is given what each leaves behind.
    ///
    /// # Errors
    /// If `keep` fails, or the shapes are not those of the forward pass.
    pub fn backward_taped(
        &self,
        tape: Tape,
        grad: &Tensor,
        keep: &mut dyn FnMut(GradStore) -> Result<()>,
    ) -> Result<()> {
        let mut grad = grad.clone();
        for (block, input) in self.blocks.iter().zip(tape.inputs).rev() {
            let x = Var::from_tensor(&input)?;
            // The gradient of this sum is that of the whole loss.
            let mut grads = (block.forward(x.as_tensor())? * &grad)?.sum_all()?.backward()?;
            grad = grads.remove(x.as_tensor()).ok_or_else(|| {
                Error::Config("a block of the image encoder passed no gradient on".into())
            })?;
            keep(grads)?;
        }
        keep((self.embed(&tape.pixels)? * &grad)?.sum_all()?.backward()?)
    }

    /// Patches, class token and positions: the input of the first block, (b, 1 + n, w).
    ///
    /// # Errors
    /// If the pictures have another size than the encoder.
    pub fn embed(&self, pixels: &Tensor) -> Result<Tensor> {
        let (b, channels, height, width) = pixels.dims4()?;
        let (size, p) = (self.config.image_size, self.config.patch_size);
        if (channels, height, width) != (3, size, size) {
            return Err(Error::Config(format!(
                "the image encoder wants pictures of 3×{size}×{size}, got {channels}×{height}×{width}"
            )));
        }
        let side = size / p;
        // A convolution whose stride is its kernel is a linear map of each patch, laid out (channel, row, column).
        let patches = pixels
            .reshape(&[b, 3, side, p, side, p])?
            .permute([0, 2, 4, 1, 3, 5])?
            .reshape((b, side * side, 3 * p * p))?;
        let patches = self.patch_embed.forward(&patches)?;
        let cls = self.cls_token.broadcast_as((b, 1, self.config.width))?;
        let x = Tensor::cat(&[&cls, &patches], 1)?.broadcast_add(&self.pos_embed)?;
        match &self.norm_pre {
            Some(norm) => norm.forward(&x),
            None => Ok(x),
        }
    }
}
