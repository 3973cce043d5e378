//! How long a run is, and what becomes of its learning rate and its Polyak average on the way.

use pixelcnn_core::engine::Update;
use pixelcnn_core::kernels::adam::Adam;
use pixelcnn_core::kernels::muon::Muon;

use super::config::{CooldownShape, MUON_FACTOR, Optimizer, PolyakStart, TrainConfig};
use super::state::TrainState;

/// The next step of a state, whose learning rate decays before it (the original's order). A cool-down
/// needs `last_step`, the one after which the run ends. The state keeps the decayed rate, without what
/// warm-up and cool-down make of it.
pub fn next_step(state: &TrainState, config: &TrainConfig, last_step: Option<u64>) -> Update {
    let step = state.step + 1;
    let decayed = state.learning_rate * config.learning_rate_decay;
    let learning_rate = decayed * config.learning_rate_factor(step, last_step);
    let adam = Adam {
        learning_rate,
        step,
        polyak_decay: config.polyak_decay_at(step),
        ..Adam::default()
    };
    let muon = (config.optimizer == Optimizer::Muon).then_some(Muon {
        learning_rate: MUON_FACTOR * learning_rate,
    });
    Update { adam, muon }
}

impl TrainConfig {
    /// What warm-up and cool-down make of the learning rate of a step, the first of which is 1.
    pub(super) fn learning_rate_factor(&self, step: u64, last_step: Option<u64>) -> f64 {
        let warmup = (step as f64 / self.warmup_steps as f64).min(1.0);
        let Some(last_step) = last_step else {
            return warmup;
        };
        let steps = (self.cooldown * last_step as f64).round();
        // Those that are taken once the step begins; none of all is taken at a rate of zero.
        let taken = step as f64 - (last_step as f64 - steps);
        let share = (taken / (steps + 1.0)).clamp(0.0, 1.0);
        warmup
            * match self.cooldown_shape {
                CooldownShape::Linear => 1.0 - share,
                CooldownShape::OneMinusSqrt => 1.0 - share.sqrt(),
            }
    }

    fn polyak_decay_at(&self, step: u64) -> f64 {
        match self.polyak_start {
            PolyakStart::Initialised | PolyakStart::Drawn => self.polyak_decay,
            PolyakStart::Growing => {
                let growing = (1.0 + step as f64) / (10.0 + step as f64);
                self.polyak_decay.min(growing)
            }
        }
    }

    /// Steps in a pass over so many training images; those that don't fill a batch are dropped, as the
    /// original does.
    pub fn steps_per_epoch(&self, images: usize) -> u64 {
        (images / self.batch_size) as u64
    }

    /// The step after which a run ends that has so many in an epoch; none as long as only time can
    /// tell.
    pub(super) fn last_step(&self, steps_per_epoch: u64, state: &TrainState) -> Option<u64> {
        if self.hours > 0.0 {
            return state.last_step;
        }
        let by_epochs = self.epochs.saturating_mul(steps_per_epoch);
        Some(match self.steps {
            0 => by_epochs,
            steps => steps.min(by_epochs),
        })
    }

    /// Where time decides how long a run is, the step after which it ends, once that can be told: when
    /// nothing but the cool-down is left, for which there is then as much time for each step as
    /// there was for those before. Where it comes late, it is shorter.
    pub(super) fn last_step_by_time(&self, state: &TrainState) -> Option<u64> {
        let before = 1.0 - self.cooldown;
        let budget = self.hours * 3600.0;
        let due = self.hours > 0.0 && state.seconds >= before * budget;
        let steps = state.step as f64;
        let in_time = || (steps / before).min(steps * budget / state.seconds).round() as u64;
        let last_step = || due.then(|| in_time().max(state.step));
        state.last_step.or_else(last_step)
    }

    /// The step after which a run ends, or is expected to.
    pub(super) fn expected_last_step(&self, steps_per_epoch: u64, state: &TrainState) -> u64 {
        let expected = || (state.step as f64 * self.hours * 3600.0 / state.seconds) as u64;
        let last_step = self.last_step(steps_per_epoch, state);
        last_step.unwrap_or_else(|| expected().max(state.step))
    }

    /// Sets the length of a run that has so many steps in an epoch to `steps` more than a state has
    /// taken, all of them cool-down.
    pub fn cool_down(&mut self, steps: u64, steps_per_epoch: u64, state: &TrainState) {
        let last_step = state.step.saturating_add(steps);
        self.cooldown = steps as f64 / last_step.max(1) as f64;
        self.steps = last_step;
        self.epochs = self.epochs.max(last_step.div_ceil(steps_per_epoch.max(1)));
        self.hours = 0.0;
    }
}

#[cfg(test)]
mod tests {
    use pixelcnn_core::ModelConfig;

    use super::*;

    fn state(step: u64, seconds: f64) -> TrainState {
        let config = TrainConfig::default();
        let state = TrainState::new(&ModelConfig::default(), &config, vec![], vec![]);
        TrainState {
            step,
            seconds,
            ..state
        }
    }

    /// Up to a whole, there for the share that is not cool-down, and down by the same amounts.
    #[test]
    fn the_learning_rate_rises_stays_and_falls() {
        let config = TrainConfig {
            warmup_steps: 4,
            cooldown: 0.3,
            ..TrainConfig::default()
        };
        let factors = |config: &TrainConfig, last| -> Vec<f64> {
            let factor = |step| config.learning_rate_factor(step, last);
            (1..=10).map(factor).collect()
        };
        let up = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0];
        assert_eq!(
            factors(&config, Some(10)),
            [&up[..], &[0.75, 0.5, 0.25]].concat()
        );
        assert_eq!(factors(&config, None)[7..], [1.0; 3]);
        let root = TrainConfig {
            cooldown_shape: CooldownShape::OneMinusSqrt,
            ..config
        };
        assert_eq!(factors(&root, Some(10))[..8], [&up[..], &[0.5]].concat());
        assert_eq!(factors(&TrainConfig::default(), Some(10)), [1.0; 10]);
    }

    #[test]
    fn a_growing_average_looks_back_over_a_tenth() {
        let config = TrainConfig {
            polyak_start: PolyakStart::Growing,
            polyak_decay: 0.99,
            ..TrainConfig::default()
        };
        let decay = |step: u64| {
            next_step(&state(step - 1, 0.0), &config, None)
                .adam
                .polyak_decay
        };
        assert_eq!([1, 80, 5000].map(decay), [2.0 / 11.0, 0.9, 0.99]);
    }

    #[test]
    fn a_cool_down_can_begin_anywhere() {
        for (taken, steps) in [(0, 7), (1, 1), (12_345, 678), (1, 1_000_000)] {
            let mut config = TrainConfig {
                epochs: 2,
                hours: 1.0,
                ..TrainConfig::default()
            };
            let state = state(taken, 0.0);
            config.cool_down(steps, 10, &state);
            config.validate().unwrap();
            let last = config.last_step(10, &state);
            assert_eq!(last, Some(taken + steps));
            let factor = |step| config.learning_rate_factor(step, last);
            assert_eq!(factor(taken), 1.0);
            let part = 1.0 / (steps + 1) as f64;
            assert!((1.0 - factor(taken + 1) - part).abs() < 1e-12);
            assert!((factor(taken + steps) - part).abs() < 1e-12);
        }
    }

    /// A quarter of an hour at a step a second, and the last third of it cool-down.
    #[test]
    fn hours_become_steps() {
        let config = TrainConfig {
            hours: 0.25,
            cooldown: 1.0 / 3.0,
            ..TrainConfig::default()
        };
        let by_time = |step, seconds| config.last_step_by_time(&state(step, seconds));
        assert_eq!(by_time(599, 599.0), None);
        assert_eq!(by_time(600, 600.5), Some(899));
        // With less time than that left, and with none.
        assert_eq!(by_time(800, 800.0), Some(900));
        assert_eq!(by_time(800, 1000.0), Some(800));
        let expected = |step, seconds| config.expected_last_step(10, &state(step, seconds));
        assert_eq!(expected(10, 5.0), 1800);
        assert_eq!(config.last_step(10, &state(600, 600.5)), None);
        assert_eq!(
            TrainConfig::default().last_step_by_time(&state(1, 1e9)),
            None
        );
        // Once that is settled, it stays.
        let settled = TrainState {
            last_step: Some(700),
            ..state(600, 600.5)
        };
        assert_eq!(config.last_step_by_time(&settled), Some(700));
        assert_eq!(config.last_step(10, &settled), Some(700));
    }
}
