//! Weight normalisation (Salimans & Kingma, 2016): a layer's weight is `W = g V / ||V||`, the norm
//! over all axes of `V` but the output channel.

use crate::network::{Layer, LayerKind};
use rayon::prelude::*;

/// Rows that one task sums up, few enough that single precision serves.
const TASK_ROWS: usize = 64;

/// How a layer's weight is normalised: `V` and `W` are \[rows, outputs, inner\].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WeightNorm {
    /// What lies before the output channel: taps, and a convolution's inputs.
    pub rows: usize,
    /// Output channels.
    pub outputs: usize,
    /// What lies behind the output channel: a transposed convolution's inputs, else 1.
    pub inner: usize,
    /// The least squared norm; smaller ones count as this.
    pub floor: f64,
}

impl WeightNorm {
    /// The normalisation of a layer: as in the original, convolutions have a floor (TensorFlow's
    /// `l2_normalize`), dense layers none.
    pub fn of(layer: &Layer) -> WeightNorm {
        let taps = layer.window.taps();
        let (rows, inner, floor) = match layer.kind {
            LayerKind::Conv => (taps * layer.inputs, 1, 1e-12),
            LayerKind::Deconv => (taps, layer.inputs, 1e-12),
            LayerKind::Dense => (layer.inputs, 1, 0.0),
        };
        WeightNorm {
            rows,
            outputs: layer.outputs,
            inner,
            floor,
        }
    }

    /// The weight `w` of the direction `v`, both \[rows, outputs, inner\], and the lengths `g`
    /// \[outputs\].
    ///
    /// # Panics
    /// If the slices' lengths disagree with the shape.
    pub fn weight(&self, v: &[f32], g: &[f32], w: &mut [f32]) {
        assert_eq!(w.len(), v.len(), "w is shaped as v");
        assert_eq!(g.len(), self.outputs, "a length for every output");
        let squares = self.products(v, v);
        let scales: Vec<f32> = squares
            .iter()
            .zip(g)
            .map(|(square, g)| (f64::from(*g) / square.max(self.floor).sqrt()) as f32)
            .collect();
        let task = TASK_ROWS * self.outputs * self.inner;
        v.par_chunks(task)
            .zip(w.par_chunks_mut(task))
            .for_each(|(v, w)| scale_task(self.inner, &scales, v, w));
    }

    /// Turns the gradient by the weight, `dw`, into that by `v`, in place, and writes that by `g` to
    /// `dg`. Shapes are [`Self::weight`]'s.
    ///
    /// # Panics
    /// If the slices' lengths disagree with the shape.
    pub fn backward(&self, v: &[f32], g: &[f32], dw: &mut [f32], dg: &mut [f32]) {
        assert_eq!(g.len(), self.outputs, "a length for every output");
        assert_eq!(dg.len(), self.outputs, "dg is shaped as g");
        let (squares, products) = (self.products(v, v), self.products(v, dw));
        let (mut by_dw, mut by_v) = (Vec::new(), Vec::new());
        for (o, (&square, &product)) in squares.iter().zip(&products).enumerate() {
            let norm = square.max(self.floor).sqrt();
            let scale = f64::from(g[o]) / norm;
            // Below the floor the norm is constant.
            let toward_v = if square > self.floor {
                product / square
            } else {
                0.0
            };
            dg[o] = (product / norm) as f32;
            by_dw.push(scale as f32);
            by_v.push((-scale * toward_v) as f32);
        }
        let task = TASK_ROWS * self.outputs * self.inner;
        v.par_chunks(task)
            .zip(dw.par_chunks_mut(task))
            .for_each(|(v, dw)| backward_task(self.inner, &by_dw, &by_v, v, dw));
    }

    /// For every output the sum of `a` times `b`: in single precision within a task's rows, then in
    /// double.
    fn products(&self, a: &[f32], b: &[f32]) -> Vec<f64> {
        let size = self.rows * self.outputs * self.inner;
        assert_eq!([a.len(), b.len()], [size; 2], "[rows, outputs, inner]");
        let task = TASK_ROWS * self.outputs * self.inner;
        let partial: Vec<Vec<f32>> = a
            .par_chunks(task)
            .zip(b.par_chunks(task))
            .map(|(a, b)| {
                let mut sums = vec![0.0; self.outputs];
                products_task(self.inner, a, b, &mut sums);
                sums
            })
            .collect();
        let mut sums = vec![0.0; self.outputs];
        for partial in partial {
            for (sum, partial) in sums.iter_mut().zip(partial) {
                *sum += f64::from(partial);
            }
        }
        sums
    }
}

vectorized! {
    fn products_task(inner: usize, a: &[f32], b: &[f32], sums: &mut [f32]) {
        let row = sums.len() * inner;
        for (a, b) in a.chunks_exact(row).zip(b.chunks_exact(row)) {
            if inner == 1 {
                for ((a, b), sum) in a.iter().zip(b).zip(&mut *sums) {
                    *sum += a * b;
                }
            } else {
                let values = a.chunks_exact(inner).zip(b.chunks_exact(inner));
                for ((a, b), sum) in values.zip(&mut *sums) {
                    *sum += dot(a, b);
                }
            }
        }
    }
}

/// The dot product, in 16 sums at a time so that it vectorises.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    let mut sums = [0.0; 16];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..16 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

vectorized! {
    fn scale_task(inner: usize, scales: &[f32], v: &[f32], w: &mut [f32]) {
        let row = scales.len() * inner;
        for (v, w) in v.chunks_exact(row).zip(w.chunks_exact_mut(row)) {
            if inner == 1 {
                for ((v, w), scale) in v.iter().zip(w).zip(scales) {
                    *w = scale * v;
                }
            } else {
                let values = v.chunks_exact(inner).zip(w.chunks_exact_mut(inner));
                for ((v, w), scale) in values.zip(scales) {
                    for (v, w) in v.iter().zip(w) {
                        *w = scale * v;
                    }
                }
            }
        }
    }
}

vectorized! {
    /// `d = by_dw * d + by_v * v`.
    fn backward_task(inner: usize, by_dw: &[f32], by_v: &[f32], v: &[f32], d: &mut [f32]) {
        let row = by_v.len() * inner;
        for (v, d) in v.chunks_exact(row).zip(d.chunks_exact_mut(row)) {
            let factors = by_dw.iter().zip(by_v);
            if inner == 1 {
                for ((v, d), (by_dw, by_v)) in v.iter().zip(d).zip(factors) {
                    *d = by_dw * *d + by_v * v;
                }
            } else {
                let values = v.chunks_exact(inner).zip(d.chunks_exact_mut(inner));
                for ((v, d), (by_dw, by_v)) in values.zip(factors) {
                    for (v, d) in v.iter().zip(d) {
                        *d = by_dw * *d + by_v * v;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};

    fn random(n: usize, scale: f32, seed: u64) -> Vec<f32> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        (0..n)
            .map(|_| scale * (random.next_u32() as i32) as f32 / 2f32.powi(31))
            .collect()
    }

    fn widen(x: &[f32]) -> Vec<f64> {
        x.iter().copied().map(f64::from).collect()
    }

    fn plain(norm: WeightNorm, v: &[f64], g: &[f64]) -> Vec<f64> {
        let output = |i: usize| i / norm.inner % norm.outputs;
        let mut squares = vec![0.0; norm.outputs];
        for (i, v) in v.iter().enumerate() {
            squares[output(i)] += v * v;
        }
        let scale = |o: usize| g[o] / squares[o].max(norm.floor).sqrt();
        v.iter()
            .enumerate()
            .map(|(i, v)| v * scale(output(i)))
            .collect()
    }

    fn check(norm: WeightNorm, scale: f32, seed: u64) -> Result<(), TestCaseError> {
        let size = norm.rows * norm.outputs * norm.inner;
        let (v, g) = (
            random(size, scale, seed),
            random(norm.outputs, 2.0, seed + 1),
        );
        let dw = random(size, 1.0, seed + 2);
        let (wide_v, wide_g, wide_dw) = (widen(&v), widen(&g), widen(&dw));
        let mut w = vec![f32::NAN; size];
        norm.weight(&v, &g, &mut w);
        for (got, want) in w.iter().zip(plain(norm, &wide_v, &wide_g)) {
            prop_assert!((f64::from(*got) - want).abs() <= 1e-6 * want.abs() + 1e-30);
        }

        let (mut dv, mut dg) = (dw, vec![f32::NAN; norm.outputs]);
        norm.backward(&v, &g, &mut dv, &mut dg);
        let loss = |v: &[f64], g: &[f64]| -> f64 {
            let w = plain(norm, v, g);
            w.iter().zip(&wide_dw).map(|(w, dw)| w * dw).sum()
        };
        // The gradient at a few places against central differences, in steps that are small beside the
        // vector's length.
        for i in (0..size).step_by(size.div_ceil(20)) {
            let o = i / norm.inner % norm.outputs;
            let own = wide_v.iter().enumerate();
            let own = own.filter(|(i, _)| i / norm.inner % norm.outputs == o);
            let length = own.map(|(_, v)| v * v).sum::<f64>().max(norm.floor).sqrt();
            let step = 1e-4 * length;
            let moved = |by: f64| {
                let mut v = wide_v.clone();
                v[i] += by;
                loss(&v, &wide_g)
            };
            let want = (moved(step) - moved(-step)) / (2.0 * step);
            // Of terms that may cancel.
            let term = wide_g[o] * wide_dw[i] / length;
            let error = (f64::from(dv[i]) - want).abs();
            prop_assert!(
                error <= 2e-6 * (1.0 / f64::from(scale) + want.abs() + term.abs()),
                "{}, {want}",
                dv[i]
            );
        }
        for o in 0..norm.outputs {
            let moved = |by: f64| {
                let mut g = wide_g.clone();
                g[o] += by;
                loss(&wide_v, &g)
            };
            let want = (moved(0.5) - moved(-0.5)) / 1.0;
            let error = (f64::from(dg[o]) - want).abs();
            prop_assert!(error <= 3e-6 * (1.0 + want.abs()), "{}, {want}", dg[o]);
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn every_shape_agrees_with_the_plain_one(
            rows in 1usize..200,
            outputs in 1usize..40,
            inner in prop_oneof![Just(1usize), 2usize..40],
            seed in any::<u32>(),
        ) {
            let norm = WeightNorm { rows, outputs, inner, floor: 1e-12 };
            check(norm, 0.1, u64::from(seed))?;
        }
    }

    #[test]
    fn a_tiny_direction_is_divided_by_the_floor() {
        let norm = WeightNorm {
            rows: 3,
            outputs: 2,
            inner: 1,
            floor: 1e-12,
        };
        check(norm, 1e-7, 1).unwrap();
        let mut w = [0.0; 6];
        norm.weight(&[1e-7; 6], &[1.0, 2.0], &mut w);
        for (got, want) in w.iter().zip([0.1, 0.2, 0.1, 0.2, 0.1, 0.2]) {
            assert!((got - want).abs() < 1e-6);
        }
        // A dense layer has none.
        WeightNorm { floor: 0.0, ..norm }.weight(&[1e-7; 6], &[1.0, 2.0], &mut w);
        assert!((w[0] - 1.0 / 3f32.sqrt()).abs() < 1e-6);
    }
    #[test]
    #[should_panic(expected = "a length for every output")]
    fn a_length_for_some_outputs_alone_is_refused() {
        let norm = WeightNorm {
            rows: 1,
            outputs: 2,
            inner: 1,
            floor: 0.0,
        };
        norm.weight(&[1.0; 2], &[1.0], &mut [0.0; 2]);
    }
}
