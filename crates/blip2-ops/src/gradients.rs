//! [`FlatGradients`]: the gradients of all trained weights in one flat tensor.
//!
//! A backward pass gives every use of a weight a gradient of its own, adds it to zeros, and the next one to that: for a weight that is
//! used four times, six passes over its memory, and two copies of it. Inside [`FlatGradients::collect`], `linear` and `embedding` add
//! what they find straight to the weight's place in the flat tensor.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Tensor, TensorId, bail};
use rayon::prelude::*;

use crate::gemm::Output;
use crate::host::{self, GRAIN, Host};

const NAME: &str = "gradients";

/// Gradients of weights, one after the other in a flat f32 tensor.
#[derive(Debug)]
pub struct FlatGradients {
    flat: Tensor,
    places: HashMap<TensorId, Place>,
    /// Of the last [`Self::collect`].
    share: f32,
}

/// Where a weight's gradient lies.
#[derive(Debug, Clone, Copy)]
struct Place {
    start: usize,
    len: usize,
    /// Something has been written since [`FlatGradients::clear`].
    is_filled: bool,
    /// In the present or last [`FlatGradients::collect`].
    is_given: bool,
}

/// What the operations of a thread see while it collects.
struct Collecting {
    flat: Tensor,
    places: HashMap<TensorId, Place>,
    share: f32,
}

thread_local! {
    static COLLECTING: RefCell<Option<Collecting>> = const { RefCell::new(None) };
}

impl FlatGradients {
    /// Room for the gradients of `weights`, in their order.
    ///
    /// # Errors
    /// If a weight is there twice.
    pub fn new<'a>(weights: impl IntoIterator<Item = &'a Tensor>) -> Result<Self> {
        let mut places = HashMap::new();
        let mut start = 0;
        for weight in weights {
            let len = weight.elem_count();
            let place = Place { start, len, is_filled: false, is_given: false };
            if places.insert(weight.id(), place).is_some() {
                bail!("{NAME}: a weight of shape {:?} is there twice", weight.shape());
            }
            start += len;
        }
        Ok(Self { flat: Tensor::zeros(start, DType::F32, &Device::Cpu)?, places, share: 1.0 })
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        for place in self.places.values_mut() {
            (place.is_filled, place.is_given) = (false, false);
        }
    }

    /// Runs `f`. The backward passes in it, as far as they are on this thread, add `share` of the gradients of weights
    /// here, and leave them out of their own results; the other gradients are there as ever.
    pub fn collect<R>(&mut self, share: f32, f: impl FnOnce() -> R) -> R {
        /// Puts everything back where it was, even if `f` panics.
        struct Outer<'a> {
            places: &'a mut HashMap<TensorId, Place>,
            outer: Option<Collecting>,
        }
        impl Drop for Outer<'_> {
            fn drop(&mut self) {
                if let Some(collecting) = COLLECTING.replace(self.outer.take()) {
                    *self.places = collecting.places;
                }
            }
        }
        self.share = share;
        let mut places = std::mem::take(&mut self.places);
        places.values_mut().for_each(|place| place.is_given = false);
        let collecting = Collecting { flat: self.flat.clone(), places, share };
        let outer = COLLECTING.replace(Some(collecting));
        let _outer = Outer { places: &mut self.places, outer };
        f()
    }

    /// Whether `weight` got a gradient in the last [`Self::collect`]; the next time it has not.
    #[must_use]
    pub fn take_given(&mut self, weight: &Tensor) -> bool {
        let place = self.places.get_mut(&weight.id());
        place.is_some_and(|place| std::mem::take(&mut place.is_given))
    }

    /// The share of the last [`Self::collect`].
    #[must_use]
    pub fn share(&self) -> f32 {
        self.share
    }

    /// Adds `share` of a gradient that came another way.
    ///
    /// # Errors
    /// If `weight` has no place here, or the gradient another size or type.
    pub fn add(&mut self, weight: &Tensor, gradient: &Tensor, share: f32) -> Result<()> {
        let gradient = Host::new(NAME, gradient)?;
        let Some(place) = self.places.get_mut(&weight.id()) else {
            bail!("{NAME}: there is no place for a weight of shape {:?}", weight.shape());
        };
        if gradient.len() != place.len {
            bail!("{NAME}: {} numbers do not fit weight {:?}", gradient.len(), weight.shape());
        }
        let output = place.fill();
        write(&self.flat, *place, |sums| {
            let pieces = sums.par_chunks_mut(GRAIN).zip(gradient.par_chunks(GRAIN));
            match output {
                Output::Replace => pieces.for_each(|(sums, new)| {
                    sums.iter_mut().zip(new).for_each(|(sum, new)| *sum = share * new);
                }),
                Output::Add => pieces.for_each(|(sums, new)| {
                    sums.iter_mut().zip(new).for_each(|(sum, new)| *sum += share * new);
                }),
            }
        })
    }

    /// That of `weight`, in its shape; it shares memory with all of them.
    ///
    /// # Errors
    /// If `weight` has no place here.
    pub fn of(&self, weight: &Tensor) -> Result<Tensor> {
        let Some(place) = self.places.get(&weight.id()) else {
            bail!("{NAME}: there is no place for a weight of shape {:?}", weight.shape());
        };
        self.flat.narrow(0, place.start, place.len)?.reshape(weight.shape())
    }

    /// All of them, in the order of the weights; what has got none since [`Self::clear`] is anything.
    #[must_use]
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// Puts other numbers in their place.
    ///
    /// # Errors
    /// If `flat` has another shape or type, or is strided.
    pub fn set(&mut self, flat: Tensor) -> Result<()> {
        host::check(NAME, &[&flat])?;
        if flat.shape() != self.flat.shape() || !flat.is_contiguous() {
            bail!("{NAME}: {:?} is not {:?}", flat.shape(), self.flat.shape());
        }
        self.flat = flat;
        Ok(())
    }
}

impl Place {
    /// What is to be done with the next gradient.
    fn fill(&mut self) -> Output {
        match std::mem::replace(&mut self.is_filled, true) {
            true => Output::Add,
            false => Output::Replace,
        }
    }
}

/// The gradient of `weight` for a backward pass: none if this thread collects it. `add` adds it to numbers, or replaces them with
/// it, after multiplication with a factor.
pub(crate) fn of_weight(
    weight: &Tensor,
    add: impl FnOnce(&mut [f32], Output, f32),
) -> Result<Option<Tensor>> {
    let collecting = COLLECTING.with_borrow_mut(|collecting| {
        let Collecting { flat, places, share } = collecting.as_mut()?;
        let place = places.get_mut(&weight.id())?;
        place.is_given = true;
        let output = place.fill();
        Some((flat.clone(), *place, output, *share))
    });
    match collecting {
        Some((flat, place, output, share)) => {
            write(&flat, place, |sums| add(sums, output, share))?;
            Ok(None)
        }
        None => {
            let mut gradient = vec![0f32; weight.elem_count()];
            add(&mut gradient, Output::Replace, 1.0);
            Ok(Some(host::tensor(gradient, weight.shape())?))
        }
    }
}

/// Lets `f` change the numbers of a place.
fn write(flat: &Tensor, place: Place, f: impl FnOnce(&mut [f32])) -> Result<()> {
    let numbers = flat.narrow(0, place.start, place.len)?;
    numbers.inplace_op1(&Write(Cell::new(Some(f))))
}

struct Write<F>(Cell<Option<F>>);

impl<F: FnOnce(&mut [f32])> InplaceOp1 for Write<F> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (CpuStorage::F32(all), Some((start, end))) = (storage, layout.contiguous_offsets())
        else {
            bail!("{NAME}: works on contiguous f32 tensors only");
        };
        if let Some(f) = self.0.take() {
            f(&mut all[start..end]);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::{embedding, linear};

    fn var(shape: (usize, usize), seed: f32) -> Var {
        let numbers: Vec<f32> =
            (0..shape.0 * shape.1).map(|i| (i as f32 * 0.7 + seed).sin()).collect();
        Var::from_tensor(&host::tensor(numbers, shape).unwrap()).unwrap()
    }

    fn numbers(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn close(name: &str, ours: &[f32], theirs: &[f32]) {
        assert_eq!(ours.len(), theirs.len(), "{name}");
        let most = theirs.iter().fold(0f32, |most, x| most.max(x.abs()));
        for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
            assert!((a - b).abs() <= 1e-5 * most, "{name}: number {i} is {a}, not {b}");
        }
    }

    /// A table whose rows are looked up twice, and which is multiplied with as well; a matrix; a weight that only other
    /// operations use.
    struct Model {
        table: Var,
        matrix: Var,
        scale: Var,
    }

    impl Model {
        fn new() -> Self {
            Self { table: var((50, 24), 0.1), matrix: var((24, 24), 0.2), scale: var((1, 24), 0.3) }
        }

        fn weights(&self) -> [&Tensor; 3] {
            [&self.table, &self.matrix, &self.scale].map(Var::as_tensor)
        }

        fn loss(&self, ids: [u32; 4]) -> Tensor {
            let ids = Tensor::new(&ids, &Device::Cpu).unwrap();
            let x = embedding(&self.table, &ids).unwrap();
            let x = linear(&x, &self.matrix, None).unwrap().broadcast_mul(&self.scale).unwrap();
            let x = (linear(&x, &self.matrix, None).unwrap()
                + embedding(&self.table, &ids).unwrap())
            .unwrap();
            linear(&x, &self.table, None).unwrap().sqr().unwrap().sum_all().unwrap()
        }
    }

    const BATCHES: [[u32; 4]; 2] = [[3, 7, 3, 49], [0, 3, 12, 7]];

    #[test]
    fn collected_gradients_are_those_of_the_backward_pass() {
        let model = Model::new();
        let mut flat = FlatGradients::new(model.weights()).unwrap();
        // The second round replaces what the first one left.
        for _ in 0..2 {
            flat.clear();
            let mut expected = vec![vec![0f32; 0]; 3];
            for batch in BATCHES {
                let store = flat.collect(0.5, || model.loss(batch).backward().unwrap());
                for (weight, is_given) in model.weights().into_iter().zip([true, true, false]) {
                    assert_eq!(flat.take_given(weight), is_given);
                    assert!(!flat.take_given(weight));
                    assert_eq!(store.get(weight).is_some(), !is_given);
                }
                flat.add(&model.scale, store.get(&model.scale).unwrap(), 0.5).unwrap();
                let store = model.loss(batch).backward().unwrap();
                for (sum, weight) in expected.iter_mut().zip(model.weights()) {
                    let new = numbers(store.get(weight).unwrap());
                    sum.resize(new.len(), 0.0);
                    sum.iter_mut().zip(new).for_each(|(sum, new)| *sum += 0.5 * new);
                }
            }
            close("all", &numbers(flat.flat()), &expected.concat());
            for (weight, expected) in model.weights().into_iter().zip(&expected) {
                let gradient = flat.of(weight).unwrap();
                assert_eq!(gradient.shape(), weight.shape());
                close("each", &numbers(&gradient), expected);
            }
        }
    }

    #[test]
    fn other_weights_and_other_threads_are_left_alone() {
        let (model, other) = (Model::new(), Model::new());
        let mut flat = FlatGradients::new([model.matrix.as_tensor()]).unwrap();
        flat.collect(1.0, || {
            let store = model.loss(BATCHES[0]).backward().unwrap();
            assert!(store.get(&model.table).is_some() && store.get(&model.matrix).is_none());
            assert!(other.loss(BATCHES[0]).backward().unwrap().get(&other.matrix).is_some());
            let elsewhere = || model.loss(BATCHES[0]).backward().unwrap();
            let store = std::thread::scope(|scope| scope.spawn(elsewhere).join().unwrap());
            assert!(store.get(&model.matrix).is_some());
        });
        assert!(flat.take_given(&model.matrix) && !flat.take_given(&model.table));
        assert!(model.loss(BATCHES[0]).backward().unwrap().get(&model.matrix).is_some());
    }

    #[test]
    fn a_panic_ends_collecting() {
        let model = Model::new();
        let mut flat = FlatGradients::new(model.weights()).unwrap();
        let panics = || flat.collect(1.0, || panic!("on purpose"));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics)).is_err());
        assert!(model.loss(BATCHES[0]).backward().unwrap().get(&model.matrix).is_some());
        flat.collect(1.0, || model.loss(BATCHES[0]).backward().unwrap());
        assert!(flat.take_given(&model.matrix));
    }

    #[test]
    fn collecting_within_collecting_goes_to_the_inner_one() {
        let model = Model::new();
        let [mut outer, mut inner] = [0; 2].map(|_| FlatGradients::new(model.weights()).unwrap());
        let backward = || model.loss(BATCHES[0]).backward().unwrap();
        outer.collect(1.0, || inner.collect(1.0, backward));
        assert!(inner.take_given(&model.matrix) && !outer.take_given(&model.matrix));
        outer.collect(1.0, || {
            inner.collect(1.0, || ());
            backward()
        });
        assert!(!inner.take_given(&model.matrix) && outer.take_given(&model.matrix));
        outer.collect(1.0, backward);
        outer.clear();
        assert!(!outer.take_given(&model.matrix), "cleared");
    }

    #[test]
    fn gradients_go_to_other_numbers_that_were_set() {
        let model = Model::new();
        let mut flat = FlatGradients::new(model.weights()).unwrap();
        let backward = || model.loss(BATCHES[0]).backward().unwrap();
        flat.collect(1.0, backward);
        let before = flat.flat().clone();
        flat.set((&before * 0.25).unwrap()).unwrap();
        flat.clear();
        flat.collect(0.5, backward);
        let half: Vec<_> = numbers(&before)[..50 * 24 + 24 * 24].iter().map(|x| 0.5 * x).collect();
        close("half", &numbers(flat.flat())[..half.len()], &half);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let model = Model::new();
        let mut flat = FlatGradients::new([model.matrix.as_tensor()]).unwrap();
        let table = model.table.as_tensor();
        let err = flat.add(table, table, 1.0).unwrap_err().to_string();
        assert!(err.contains("no place for a weight of shape [50, 24]"), "{err}");
        let err = flat.of(table).unwrap_err().to_string();
        assert!(err.contains("no place for a weight of shape [50, 24]"), "{err}");
        let err = flat.add(&model.matrix, table, 1.0).unwrap_err().to_string();
        assert!(err.contains("1200 numbers do not fit weight [24, 24]"), "{err}");
        let err = FlatGradients::new([table, table]).unwrap_err().to_string();
        assert!(err.contains("[50, 24] is there twice"), "{err}");
        let err = flat.set(table.clone()).unwrap_err().to_string();
        assert!(err.contains("[50, 24] is not [576]"), "{err}");
    }
}
