//! The judge judged: its gradients are slopes of its nats.

use super::*;
use crate::suite::{Images, batch, configs, configs_of_codes, configs_of_energy, parameters};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

#[test]
fn gradients_are_the_slopes_of_the_nats() {
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let dropout = Dropout {
        rate: 0.3,
        seed: 3,
        first: 0,
    };
    for (config, dropout) in [configs(), configs_of_codes(), configs_of_energy()]
        .concat()
        .into_iter()
        .zip([None, Some(dropout)].into_iter().cycle())
    {
        let config = ModelConfig {
            height: 4,
            width: 4,
            nr_filters: config.nr_filters.min(6),
            ..config
        };
        let mut parameters: Vec<Vec<f64>> = parameters(&config, &mut random)
            .into_iter()
            .map(|values| values.into_iter().map(f64::from).collect())
            .collect();
        let images = Images::random(&config, 2, &mut random);
        let run = |parameters: &[Vec<f64>]| {
            let batch = batch(&images);
            super::run(&config, parameters, batch, dropout).unwrap()
        };
        let gradients = run(&parameters).gradients;
        let all = gradients.iter().flatten().map(|gradient| gradient.powi(2));
        let length = all.sum::<f64>().sqrt();
        for number in 0..parameters.len() {
            // Along a direction of its own: every value of the parameter counts.
            let direction: Vec<f64> = gradients[number]
                .iter()
                .map(|_| f64::from(random.next_u32() as i32) / 2f64.powi(31))
                .collect();
            let kept = parameters[number].clone();
            let mut at = |step: f64| {
                let moved = kept.iter().zip(&direction).map(|(p, d)| p + step * d);
                parameters[number] = moved.collect();
                run(&parameters).nats.iter().sum::<f64>()
            };
            let slope = (at(1e-6) - at(-1e-6)) / 2e-6;
            parameters[number] = kept;
            let want = gradients[number].iter().zip(&direction);
            let want: f64 = want.map(|(gradient, d)| gradient * d).sum();
            assert!(
                (slope - want).abs() < 1e-5 * length,
                "{config:?}, parameter {number}: {slope}, {want}"
            );
        }
    }
}
