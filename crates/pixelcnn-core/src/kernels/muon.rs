//! Muon (Jordan et al., 2024): a matrix of weights moves by the orthogonal matrix nearest to its
//! gradient's mean, so that all directions in which it could move count alike.

use super::adam::Rates;
use super::conv::Conv;
use crate::engine::Precision;
use crate::network::Window;

/// Coefficients of a Newton-Schulz iteration, `Y (a + b YᵀY + c (YᵀY)²)`: five take the singular values of a
/// matrix of norm 1 to about 1, between 0.7 and 1.2, all but the smallest.
pub const COEFFICIENTS: [f32; 3] = [3.4445, -4.775, 2.0315];

/// Iterations.
pub const ITERATIONS: usize = 5;

/// Below it a gradient's mean is none.
pub const LEAST_NORM: f64 = 1e-20;

/// One step of Muon. Its momentum is Adam's mean of the gradient.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Muon {
    /// The length by which a layer's `V` moves for each output, as a share of its length when it is drawn:
    /// of the weight itself then, whatever `g` is.
    pub learning_rate: f64,
}

impl Muon {
    /// Moves a matrix \[rows, columns\] along its `gradient`, which is lost, with the `first` moment, and then
    /// its `average` towards it. The slices are values of the same parameters, in the same order.
    ///
    /// # Panics
    /// If a slice has not the length of the matrix.
    pub fn update(
        &self,
        rates: Rates,
        [rows, columns]: [usize; 2],
        parameter: &mut [f32],
        gradient: &mut Vec<f32>,
        first: &mut [f32],
        average: &mut [f32],
    ) {
        let lengths = [gradient.len(), first.len(), average.len(), parameter.len()];
        assert_eq!(Some(lengths), rows.checked_mul(columns).map(|n| [n; 4]));
        for (gradient, first) in gradient.iter_mut().zip(first) {
            *first += rates.take_1 * (*gradient - *first);
            // Nesterov's: the mean as it would be after the same gradient again.
            *gradient = *first + rates.take_1 * (*gradient - *first);
        }
        if rows < columns {
            *gradient = transposed(gradient, columns);
        }
        orthogonalise(rows.min(columns), gradient);
        if rows < columns {
            *gradient = transposed(gradient, rows);
        }
        let rate = (self.learning_rate * drawn_length([rows, columns])) as f32;
        let values = parameter.iter_mut().zip(gradient).zip(average);
        for ((parameter, direction), average) in values {
            *parameter -= rate * *direction;
            *average += rates.take_average * (*parameter - *average);
        }
    }
}

/// The length of what moves in a `V`: that of each output in one that is drawn from N(0, 0.05²) is about
/// 0.05 times the root of its inputs, and in an orthogonal matrix 1, or less where it is wide.
pub fn drawn_length([rows, columns]: [usize; 2]) -> f64 {
    0.05 * (rows.max(columns) as f64).sqrt()
}

/// Makes a matrix of so many columns, and no fewer rows, about orthogonal. Sums are taken in an order that
/// depends on the shape alone.
fn orthogonalise(columns: usize, y: &mut Vec<f32>) {
    let rows = y.len() / columns;
    let square = |value: &f32| f64::from(*value) * f64::from(*value);
    let norm = y.iter().map(square).sum::<f64>().sqrt();
    let scale = (1.0 / norm.max(LEAST_NORM)) as f32;
    y.iter_mut().for_each(|value| *value *= scale);

    // Products of matrices are those of a dense layer.
    let dense = Conv {
        window: Window::POINT,
        transposed: false,
        inputs: columns,
        outputs: columns,
        precision: Precision::F32,
    };
    let [a, b, c] = COEFFICIENTS;
    let (mut gram, mut unused) = (vec![0.0; columns * columns], vec![0.0; columns]);
    let bias = vec![0.0; columns];
    let (mut factor, mut product) = (gram.clone(), y.clone());
    for _ in 0..ITERATIONS {
        dense.backward_weight([1, 1, rows], y, y, &mut gram, &mut unused);
        dense.forward([1, 1, columns], &gram, &gram, &bias, false, &mut factor);
        for (i, (factor, gram)) in factor.iter_mut().zip(&gram).enumerate() {
            *factor = b * gram + c * *factor;
            if i % (columns + 1) == 0 {
                *factor += a;
            }
        }
        dense.forward([1, 1, rows], y, &factor, &bias, false, &mut product);
        std::mem::swap(y, &mut product);
    }
}

/// A matrix of so many columns with its rows and columns exchanged.
fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
    let column = |column: usize| values[column..].iter().step_by(columns);
    (0..columns).flat_map(column).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::adam::Adam;
    use proptest::prelude::*;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};

    /// Row by row.
    type Matrix = Vec<Vec<f64>>;

    fn product(x: &Matrix, y: &Matrix) -> Matrix {
        let sum = |row: &[f64], j: usize| row.iter().zip(y).map(|(x, y)| x * y[j]).sum();
        let row = |row: &Vec<f64>| (0..y[0].len()).map(|j| sum(row, j)).collect();
        x.iter().map(row).collect()
    }

    fn flipped(x: &Matrix) -> Matrix {
        let column = |j: usize| x.iter().map(|row| row[j]).collect();
        (0..x[0].len()).map(column).collect()
    }

    /// As in the original's description, in double precision: on the wide form.
    fn plain(x: &Matrix) -> Matrix {
        let wide = x.len() <= x[0].len();
        let mut y = if wide { x.clone() } else { flipped(x) };
        let norm = y.iter().flatten().map(|y| y * y).sum::<f64>().sqrt();
        y.iter_mut().flatten().for_each(|y| *y /= norm);
        for _ in 0..ITERATIONS {
            let gram = product(&y, &flipped(&y));
            let square = product(&gram, &gram);
            let mut next = y.clone();
            for (i, row) in next.iter_mut().enumerate() {
                for (j, value) in row.iter_mut().enumerate() {
                    let sum = |k: usize| (-4.775 * gram[i][k] + 2.0315 * square[i][k]) * y[k][j];
                    *value = 3.4445 * *value + (0..y.len()).map(sum).sum::<f64>();
                }
            }
            y = next;
        }
        if wide { y } else { flipped(&y) }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn steps_follow_the_plain_ones(rows in 1usize..70, columns in 1usize..70, seed: u64) {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            let mut draw = || f64::from((random.next_u32() as i32) as f32 / 2f32.powi(31));
            let count = rows * columns;
            let single = |values: &[f64]| values.iter().map(|&v| v as f32).collect::<Vec<_>>();
            let mut want: Vec<f64> = (0..count).map(|_| draw()).collect();
            let mut want_average = want.clone();
            let mut mean = vec![0.0; count];
            let (mut parameter, mut average) = (single(&want), single(&want));
            let mut first = vec![0.0; count];
            let muon = Muon { learning_rate: 0.02 };
            for _ in 0..3 {
                let gradient: Vec<f64> = (0..count).map(|_| 1e-3 * draw()).collect();
                muon.update(
                    Adam::default().rates(),
                    [rows, columns],
                    &mut parameter,
                    &mut single(&gradient),
                    &mut first,
                    &mut average,
                );
                let mut ahead = Matrix::new();
                for (means, gradient) in mean.chunks_mut(columns).zip(gradient.chunks(columns)) {
                    ahead.push(means.iter_mut().zip(gradient).map(|(mean, gradient)| {
                        *mean = 0.95 * *mean + 0.05 * gradient;
                        0.95 * *mean + 0.05 * gradient
                    }).collect());
                }
                let rate = 0.02 * 0.05 * (rows.max(columns) as f64).sqrt();
                let moves = plain(&ahead).concat();
                for ((want, average), step) in want.iter_mut().zip(&mut want_average).zip(moves) {
                    *want -= rate * step;
                    *average = 0.9995 * *average + 0.0005 * *want;
                }
            }
            for i in 0..count {
                prop_assert!((f64::from(parameter[i]) - want[i]).abs() < 1e-4);
                prop_assert!((f64::from(average[i]) - want_average[i]).abs() < 1e-6);
                prop_assert!((f64::from(first[i]) - mean[i]).abs() < 1e-9);
            }
        }
    }

    /// What makes Muon what it is: a gradient of any size and condition moves all directions alike.
    #[test]
    fn all_directions_move_alike() {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let mut draw = || (random.next_u32() as i32) as f32 / 2f32.powi(31);
        let [rows, columns] = [96, 24];
        // Columns of very different lengths.
        let mut y: Vec<f32> = (0..rows * columns)
            .map(|i| draw() * 1e-9 * 1.1f32.powi((i % columns) as i32))
            .collect();
        orthogonalise(columns, &mut y);
        for i in 0..columns {
            for j in 0..columns {
                let pairs = y.chunks(columns).map(|row| row[i] * row[j]);
                let product: f32 = pairs.sum();
                match i == j {
                    true => assert!((0.4..1.5).contains(&product), "{product}"),
                    false => assert!(product.abs() < 0.35, "{product}"),
                }
            }
        }
    }

    #[test]
    fn nothing_moves_without_a_gradient() {
        let mut parameter = vec![0.5; 12];
        Muon {
            learning_rate: 0.02,
        }
        .update(
            Adam::default().rates(),
            [4, 3],
            &mut parameter,
            &mut vec![0.0; 12],
            &mut [0.0; 12],
            &mut [0.5; 12],
        );
        assert_eq!(parameter, [0.5; 12]);
    }
}
