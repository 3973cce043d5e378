//! Least squares over samples as they come, of which the latest count most: the same bits on every machine.
//! All numbers here are part of the `.pxc` format: others would make archives that exist unreadable.

use crate::kernels::vectorized;

/// Samples between two solutions.
const EVERY: usize = 16;
/// What is left of a sample's weight at the next one.
const MEMORY: f64 = 0.9985;
/// Pulls the coefficients towards 0, as so many samples of unit inputs and no target would.
const RIDGE: f64 = 5.0;
/// Inputs come in as many: those that are missing are 0.
pub(super) const LANES: usize = 8;

/// A linear prediction of a target from inputs.
///
/// Every number is a product, a sum, a quotient or a root in double precision, rounded by itself (nothing is
/// fused) and in one order: so it is the same on all machines.
#[derive(Debug, Clone)]
pub(super) struct LeastSquares {
    /// Sums of the weighted products of inputs, and as a last row those with the target: of each row the part
    /// up to the diagonal is used. Rows are whole [`LANES`].
    products: Vec<f64>,
    coefficients: Vec<f64>,
    samples: usize,
    /// Where the equations are solved.
    rows: Vec<f64>,
    column: Vec<f64>,
}

impl LeastSquares {
    /// For so many inputs; it predicts 0.
    pub fn new(inputs: usize) -> LeastSquares {
        let width = inputs.next_multiple_of(LANES);
        LeastSquares {
            products: vec![0.0; (inputs + 1) * width],
            coefficients: vec![0.0; width],
            samples: 0,
            rows: Vec::new(),
            column: vec![0.0; inputs + 1],
        }
    }

    /// The target of inputs, which are whole [`LANES`].
    pub fn predict(&self, inputs: &[f64]) -> f64 {
        let mut sums = [0.0; LANES];
        let chunks = inputs.chunks_exact(LANES);
        for (x, c) in chunks.zip(self.coefficients.chunks_exact(LANES)) {
            for (sum, (x, c)) in sums.iter_mut().zip(x.iter().zip(c)) {
                *sum += x * c;
            }
        }
        sums.iter().sum()
    }

    /// Takes a sample; its weight is not negative.
    pub fn learn(&mut self, inputs: &[f64], target: f64, weight: f64) {
        add(inputs, target, weight, &mut self.products);
        self.samples += 1;
        if self.samples.is_multiple_of(EVERY) {
            self.rows.clone_from(&self.products);
            solve(&mut self.rows, &mut self.column, &mut self.coefficients);
        }
    }
}

vectorized! {
    /// Adds a sample to the sums.
    fn add(inputs: &[f64], target: f64, weight: f64, products: &mut [f64]) {
        let width = inputs.len();
        let (products, targets) = products.split_at_mut(products.len() - width);
        let rows = products.chunks_exact_mut(width).zip(inputs).enumerate();
        for (row, (products, input)) in rows {
            let input = input * weight;
            let len = (row + 1).next_multiple_of(LANES);
            for (sum, other) in products[..len].iter_mut().zip(&inputs[..len]) {
                *sum = *sum * MEMORY + input * other;
            }
        }
        let target = target * weight;
        for (sum, input) in targets.iter_mut().zip(inputs) {
            *sum = *sum * MEMORY + target * input;
        }
    }
}

vectorized! {
    /// Solves the normal equations of these sums, which it spoils, by Cholesky's factors; where rounding leaves
    /// none, the coefficients stay.
    fn solve(rows: &mut [f64], column: &mut [f64], coefficients: &mut [f64]) {
        let (inputs, width) = (column.len() - 1, coefficients.len());
        for k in 0..inputs {
            let pivot = rows[k * width + k] + RIDGE;
            if !(pivot > 0.0 && pivot.is_finite()) {
                return;
            }
            let root = pivot.sqrt();
            rows[k * width + k] = root;
            for row in k + 1..=inputs {
                let value = &mut rows[row * width + k];
                *value /= root;
                column[row] = *value;
            }
            for row in k + 1..=inputs {
                let (factor, end) = (column[row], inputs.min(row + 1));
                let values = &mut rows[row * width..][k + 1..end];
                for (value, other) in values.iter_mut().zip(&column[k + 1..end]) {
                    *value -= factor * other;
                }
            }
        }
        let (rows, rest) = rows.split_at_mut(inputs * width);
        for (k, row) in rows.chunks_exact(width).enumerate().rev() {
            let coefficient = rest[k] / row[k];
            coefficients[k] = coefficient;
            for (value, factor) in rest[..k].iter_mut().zip(row) {
                *value -= factor * coefficient;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};

    fn uniform(random: &mut ChaCha8Rng) -> f64 {
        f64::from(random.next_u32() as i32) / 2f64.powi(31)
    }

    /// The coefficients minimise what they promise to: its gradient is zero.
    #[test]
    fn the_weighted_squares_are_the_least() {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        for inputs in [1, 2, 7, 8, 9, 27, 37] {
            let mut squares = LeastSquares::new(inputs);
            let truth: Vec<f64> = (0..inputs).map(|_| 3.0 * uniform(&mut random)).collect();
            let mut samples = Vec::new();
            for _ in 0..EVERY * 40 {
                let mut x = vec![0.0; inputs.next_multiple_of(LANES)];
                x[..inputs].fill_with(|| 20.0 * uniform(&mut random));
                let exact: f64 = x.iter().zip(&truth).map(|(x, c)| x * c).sum();
                let (target, weight) = (exact + uniform(&mut random), uniform(&mut random).abs());
                squares.learn(&x, target, weight);
                samples.push((x, target, weight));
            }
            for i in 0..inputs {
                let mut gradient = RIDGE * squares.coefficients[i];
                let mut size: f64 = 1.0;
                let mut left = 1.0;
                for (x, target, weight) in samples.iter().rev() {
                    let part = left * weight * x[i] * (squares.predict(x) - target);
                    gradient += part;
                    size += part.abs();
                    left *= MEMORY;
                }
                assert!(gradient.abs() < 1e-9 * size, "{gradient} of {size}");
                let off = (squares.coefficients[i] - truth[i]).abs();
                assert!(off < 0.05, "{} for {}", squares.coefficients[i], truth[i]);
            }
            assert!(squares.coefficients[inputs..].iter().all(|c| *c == 0.0));
        }
    }

    #[test]
    fn inputs_that_depend_on_each_other_do_no_harm() {
        let mut squares = LeastSquares::new(3);
        for n in 0..10 * EVERY {
            let x = (n % 7) as f64 * 40.0;
            squares.learn(&[x, x, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], 3.0 * x, 1.0);
        }
        let got = squares.predict(&[2.0, 2.0, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        assert!((got - 6.0).abs() < 1e-3, "{got}");
    }

    /// Compiled without this machine's vectors, the numbers are the same bits.
    #[test]
    fn vectors_do_not_change_a_bit() {
        let mut random = ChaCha8Rng::seed_from_u64(2);
        let inputs = 19;
        let mut squares = LeastSquares::new(inputs);
        let mut plain = vec![vec![0.0; inputs]; inputs + 1];
        for n in 1..=EVERY * 20 {
            let mut x = vec![0.0; inputs.next_multiple_of(LANES)];
            x[..inputs].fill_with(|| 50.0 * uniform(&mut random));
            let (target, weight) = (9.0 * uniform(&mut random), uniform(&mut random).abs());
            squares.learn(&x, target, weight);
            for (row, sums) in plain.iter_mut().enumerate() {
                let own = weight * if row < inputs { x[row] } else { target };
                for (sum, x) in sums.iter_mut().zip(&x) {
                    *sum = *sum * MEMORY + own * x;
                }
            }
            if n % (EVERY * 5) == 0 {
                let mut rows = plain.clone();
                for k in 0..inputs {
                    rows[k][k] = (rows[k][k] + RIDGE).sqrt();
                    for row in k + 1..=inputs {
                        rows[row][k] /= rows[k][k];
                    }
                    for row in k + 1..=inputs {
                        for j in k + 1..inputs.min(row + 1) {
                            let other = rows[j][k];
                            rows[row][j] -= rows[row][k] * other;
                        }
                    }
                }
                for k in (0..inputs).rev() {
                    let want = rows[inputs][k] / rows[k][k];
                    assert_eq!(squares.coefficients[k].to_bits(), want.to_bits());
                    let (rows, last) = rows.split_at_mut(inputs);
                    for (value, factor) in last[0][..k].iter_mut().zip(&rows[k]) {
                        *value -= factor * want;
                    }
                }
            }
        }
    }
}
