//! The image encoder of a training run: its output kept on disk, frozen in memory, or trained together with the bridge.
//!
//! A trained encoder is not one graph with the rest: its activations would take more memory than everything else. Its
//! forward pass keeps the blocks' inputs ([`blip2::vit::Tape`]), and the backward pass computes each block again.

use std::collections::BTreeMap;

use blip2::image::Rgb;
use blip2::model::{Vision, VisionPart};
use blip2::params::Params;
use blip2::vit::{Tape, Vit};
use candle_core::{Tensor, Var};

use crate::optim::VISION;
use crate::parts::Base;
use crate::recipe::Recipe;
use crate::trainer::StepOutput;
use crate::{Error, Result};

/// What a batch shows: pictures, or what the frozen encoder made of them.
pub(crate) enum Shown {
    Pictures(Vec<Rgb>),
    Features(Tensor),
}

/// The encoder of a run.
pub(crate) enum Encoder<'a> {
    /// Everything comes from the feature cache.
    Cached,
    Frozen(&'a Vision),
    Trained(Vision),
}

/// A batch as the bridge sees it.
pub(crate) struct Seen {
    /// (b, tokens, width).
    pub(crate) patches: Tensor,
    tape: Option<Tape>,
}

impl<'a> Encoder<'a> {
    /// The encoder among the trained parameters, if `part` is given; else the frozen one, if there is any.
    pub(crate) fn new(
        params: &Params,
        part: Option<&VisionPart>,
        frozen: Option<&'a Vision>,
    ) -> blip2::Result<Self> {
        Ok(match (part, frozen) {
            (Some(part), _) => {
                let vit = Vit::new(&params.pp(VISION.trim_end_matches('.')), &part.config)?;
                Self::Trained(Vision::new(vit, part.normalize))
            }
            (None, Some(vision)) => Self::Frozen(vision),
            (None, None) => Self::Cached,
        })
    }

    pub(crate) fn see(&self, shown: &Shown) -> Result<Seen> {
        let (patches, tape) = match (shown, self) {
            (Shown::Features(features), _) => (features.clone(), None),
            (Shown::Pictures(pictures), Self::Frozen(vision)) => (vision.encode(pictures)?, None),
            (Shown::Pictures(pictures), Self::Trained(vision)) => {
                let (features, tape) = vision.vit().forward_taped(&vision.pixels(pictures)?)?;
                // A variable, so that the bridge's backward pass leaves its gradient.
                (Var::from_tensor(&features)?.into_inner(), Some(tape))
            }
            (Shown::Pictures(_), Self::Cached) => {
                return Err(Error::Training(
                    "pictures came in, but no image encoder is loaded".into(),
                ));
            }
        };
        Ok(Seen { patches, tape })
    }

    /// A step's output, its gradients taken back through the encoder if that is trained.
    pub(crate) fn output(
        &self,
        seen: Seen,
        loss: &Tensor,
        parts: Vec<(&'static str, f32)>,
    ) -> Result<StepOutput> {
        let mut output = StepOutput::new(loss, parts)?;
        if let (Self::Trained(vision), Some(tape), Some(grads)) =
            (self, seen.tape, &mut output.grads)
        {
            let grad = grads.remove(&seen.patches).ok_or_else(|| {
                Error::Training("the bridge passed no gradient to the image encoder".into())
            })?;
            vision.vit().backward_taped(tape, &grad, &mut |more| Ok(grads.extend(more)?))?;
        }
        Ok(output)
    }
}

/// Puts the image encoder among the tensors to train, if the recipe trains it.
pub(crate) fn add_to_start(
    recipe: &Recipe,
    base: &Base,
    start: &mut BTreeMap<String, Tensor>,
) -> Result<Option<VisionPart>> {
    if !recipe.trains_vision() {
        return Ok(None);
    }
    let model = base.model()?;
    for (name, tensor) in model.fitted_vision(&mut |_, _, _| {})? {
        start.insert(format!("{VISION}{name}"), tensor.load()?);
    }
    Ok(Some(model.manifest.vision))
}
