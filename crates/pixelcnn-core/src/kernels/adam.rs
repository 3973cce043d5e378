//! The optimiser's step (Kingma & Ba, 2015, as the original's `adam_updates`) and the Polyak average
//! of the parameters, in one pass over memory.

use rayon::prelude::*;

/// Values that one task updates.
const TASK: usize = 1 << 14;

/// One step of Adam. Its rates are in double precision, since 1 - 0.9995 in single is off by 6e-5.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adam {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay of the gradient's mean.
    pub beta_1: f64,
    /// Decay of the squared gradient's mean.
    pub beta_2: f64,
    /// Added to the squared gradient's mean, inside the square root.
    pub epsilon: f64,
    /// Number of this step; the first is 1.
    pub step: u64,
    /// Decay of the parameters' average.
    pub polyak_decay: f64,
}

impl Default for Adam {
    /// The original's settings, at the first step.
    fn default() -> Self {
        Adam {
            learning_rate: 1e-3,
            beta_1: 0.95,
            beta_2: 0.9995,
            epsilon: 1e-8,
            step: 1,
            polyak_decay: 0.9995,
        }
    }
}

/// [`Adam`] as its inner loop takes it: `mean += take_1 * (gradient - mean)`, alike the mean of
/// squares and the average, and `parameter -= rate * mean / sqrt(square * correction_2 + epsilon)`.
#[derive(Debug, Clone, Copy)]
// As GPUs take it.
#[repr(C)]
pub struct Rates {
    /// 1 - `beta_1`.
    pub take_1: f32,
    /// 1 - `beta_2`.
    pub take_2: f32,
    /// The learning rate, corrected for the first moment's start at zero.
    pub rate: f32,
    /// Corrects the second moment for its start at zero.
    pub correction_2: f32,
    /// `epsilon`.
    pub epsilon: f32,
    /// 1 - `polyak_decay`.
    pub take_average: f32,
}

impl Adam {
    /// The step in single precision.
    pub fn rates(&self) -> Rates {
        let step = self.step as f64;
        Rates {
            take_1: (1.0 - self.beta_1) as f32,
            take_2: (1.0 - self.beta_2) as f32,
            rate: (self.learning_rate / (1.0 - self.beta_1.powf(step))) as f32,
            correction_2: (1.0 / (1.0 - self.beta_2.powf(step))) as f32,
            epsilon: self.epsilon as f32,
            take_average: (1.0 - self.polyak_decay) as f32,
        }
    }

    /// Moves parameters along their `gradient`, with its `first` and `second` moments, and then
    /// their `average` towards them. All are values of the same parameters, in the same order.
    ///
    /// # Panics
    /// If the slices' lengths disagree.
    pub fn update(
        &self,
        parameter: &mut [f32],
        gradient: &[f32],
        first: &mut [f32],
        second: &mut [f32],
        average: &mut [f32],
    ) {
        let lengths = [gradient.len(), first.len(), second.len(), average.len()];
        assert_eq!(lengths, [parameter.len(); 4], "one of each a parameter");
        let rates = self.rates();
        parameter
            .par_chunks_mut(TASK)
            .zip(gradient.par_chunks(TASK))
            .zip(first.par_chunks_mut(TASK))
            .zip(second.par_chunks_mut(TASK))
            .zip(average.par_chunks_mut(TASK))
            .for_each(|((((parameter, gradient), first), second), average)| {
                update_task(rates, parameter, gradient, first, second, average);
            });
    }
}

vectorized! {
    fn update_task(
        rates: Rates,
        parameter: &mut [f32],
        gradient: &[f32],
        first: &mut [f32],
        second: &mut [f32],
        average: &mut [f32],
    ) {
        let moments = first.iter_mut().zip(second);
        let values = parameter.iter_mut().zip(gradient).zip(moments).zip(average);
        for (((parameter, gradient), (first, second)), average) in values {
            // Not `decay * mean + (1 - decay) * value`: in single precision those two don't sum to 1.
            *first += rates.take_1 * (gradient - *first);
            *second += rates.take_2 * (gradient * gradient - *second);
            let root = (*second * rates.correction_2 + rates.epsilon).sqrt();
            *parameter -= rates.rate * *first / root;
            *average += rates.take_average * (*parameter - *average);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};

    #[test]
    fn steps_follow_the_plain_ones() {
        for n in [1, 37, TASK + 5] {
            let mut random = ChaCha8Rng::seed_from_u64(n as u64);
            let mut draw = || (random.next_u32() as i32) as f32 / 2f32.powi(31);
            let mut parameter: Vec<f32> = (0..n).map(|_| draw()).collect();
            let mut average = parameter.clone();
            let (mut first, mut second) = (vec![0.0; n], vec![0.0; n]);
            let mut plain: Vec<[f64; 4]> = parameter
                .iter()
                .map(|&p| [f64::from(p), 0.0, 0.0, f64::from(p)])
                .collect();
            for step in 1..=20 {
                // Gradients of every size, so that epsilon matters.
                let gradient: Vec<f32> = (0..n)
                    .map(|i| draw() * 10f32.powi(-(i as i32 % 7)))
                    .collect();
                let adam = Adam {
                    learning_rate: 0.01 / step as f64,
                    step,
                    ..Adam::default()
                };
                adam.update(
                    &mut parameter,
                    &gradient,
                    &mut first,
                    &mut second,
                    &mut average,
                );
                for ([p, v, mg, ema], g) in plain.iter_mut().zip(&gradient) {
                    let g = f64::from(*g);
                    *mg = 0.9995 * *mg + 0.0005 * g * g;
                    *v = 0.95 * *v + 0.05 * g;
                    let v_hat = *v / (1.0 - 0.95f64.powi(step as i32));
                    let mg_hat = *mg / (1.0 - 0.9995f64.powi(step as i32));
                    *p -= 0.01 / step as f64 * v_hat / (mg_hat + 1e-8).sqrt();
                    *ema = 0.9995 * *ema + 0.0005 * *p;
                }
            }
            for (i, [p, v, mg, ema]) in plain.iter().enumerate() {
                assert!((f64::from(parameter[i]) - p).abs() < 1e-6);
                assert!((f64::from(average[i]) - ema).abs() < 1e-6);
                assert!((f64::from(first[i]) - v).abs() < 1e-6);
                assert!((f64::from(second[i]) - mg).abs() < 1e-6 * mg.max(1e-9));
            }
        }
    }
}
