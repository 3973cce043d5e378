//! Plans carried out plainly, one step after the other on one image: they give what the walk gives,
//! in whatever order the steps' turns may come.

use super::*;
use crate::plan::{Operation, Plan, Turn};
use crate::suite::{self, Images, configs, configs_of_codes, configs_of_energy, parameters};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// A plan being carried out on an image.
struct Carried<'a> {
    plan: &'a Plan,
    config: &'a ModelConfig,
    parameters: &'a [Vec<f64>],
    /// The image.
    x: &'a Map,
    conditions: Vec<usize>,
    dropout: Option<(Dropout, usize)>,
    slots: Vec<Vec<f64>>,
    nats: f64,
    gradients: Vec<Vec<f64>>,
}

impl Carried<'_> {
    fn read(&self, buffer: usize) -> Map {
        let buffer = &self.plan.buffers[buffer];
        let values = self.slots[buffer.slot][..buffer.values()].to_vec();
        Map::new(self.config, buffer.scale, buffer.channels, values)
    }

    fn write(&mut self, buffer: usize, values: &[f64]) {
        let buffer = &self.plan.buffers[buffer];
        assert_eq!(values.len(), buffer.values());
        self.slots[buffer.slot][..values.len()].copy_from_slice(values);
    }

    /// What a buffer holds is not to be used any more.
    fn spoil(&mut self, buffer: usize) {
        let values = self.plan.buffers[buffer].values();
        self.write(buffer, &vec![f64::NAN; values]);
    }

    fn step(&mut self, step: usize) {
        let forward = self.plan.forward.len();
        if step < forward {
            self.forward(step);
        } else if step == forward {
            let mut tape = self.tape();
            let logits = tape.note(Origin::Image, self.read(self.plan.logits));
            let (last, nats, gradient) = tape.judged(self.x, logits);
            if let Some(buffer) = self.plan.d_logits {
                let mut gradients = self.gradients.clone();
                let by_maps = tape.backward(last, gradient, &mut gradients);
                self.gradients = gradients;
                self.write(buffer, &by_maps[logits]);
            }
            self.nats = nats;
        } else {
            self.backward(step - forward - 1);
        }
    }

    /// An empty tape.
    fn tape(&self) -> Tape<'_> {
        Tape {
            config: self.config,
            parameters: self.parameters,
            conditions: self.conditions.clone(),
            dropout: self.dropout,
            columns: usize::MAX,
            maps: Vec::new(),
            recorded: Vec::new(),
        }
    }

    /// An operation on what its buffers hold: the tape, the numbers on it of what it reads in the
    /// order of [`Backward::inputs`](crate::plan::Backward::inputs), and of its result.
    fn taped(&self, operation: &Operation) -> (Tape<'_>, Vec<usize>, usize) {
        let mut tape = self.tape();
        let mut note = |buffer: &usize| tape.note(Origin::Image, self.read(*buffer));
        let (read, to) = match operation {
            Operation::Images { to } => {
                let image = tape.note(Origin::Image, self.x.clone());
                let channels = self.plan.buffers[*to].channels;
                let to = match channels > self.config.channels {
                    true => tape.append_ones(&image),
                    false => tape.first_channels(&image, channels),
                };
                (vec![], to)
            }
            Operation::Embed { layer, map, .. } => {
                let image = tape.note(Origin::Image, self.x.clone());
                (vec![], tape.embed(layer, &image, *map))
            }
            Operation::Layer { layer, from, .. } => {
                let from = note(from);
                (vec![from], tape.layer(layer, &from))
            }
            Operation::GatedResnet { block, x, a, .. } => {
                let read: Vec<usize> = [x].into_iter().chain(a).map(note).collect();
                let a = match read[1..] {
                    [] => None,
                    [a] => Some(a),
                    [a, b] => Some(tape.concat(&a, &b)),
                    _ => unreachable!("a block has two auxiliary maps at most"),
                };
                let to = tape.gated_resnet(block, &read[0], a.as_ref());
                (read, to)
            }
            Operation::Shift { by, from, .. } => {
                let from = note(from);
                (vec![from], tape.shifted(*by, from))
            }
            Operation::Add { from, to } => {
                let read = [to, from].map(note);
                (read.to_vec(), tape.add(read[0], read[1]))
            }
            Operation::Elu { from, .. } => {
                let from = note(from);
                (vec![from], tape.elu(from))
            }
            &Operation::Attention {
                heads,
                ref queries,
                ref keys_values,
                ..
            } => {
                let read = [queries, keys_values].map(note);
                (read.to_vec(), tape.attention(heads, &read[0], &read[1]))
            }
            Operation::Concat { from, .. } => {
                let read: Vec<usize> = from.iter().map(note).collect();
                let all = read.iter().copied();
                let to = all.reduce(|before, map| tape.concat(&before, &map));
                (read, to.expect("maps"))
            }
        };
        (tape, read, to)
    }

    fn forward(&mut self, number: usize) {
        let operation = &self.plan.forward[number];
        let (tape, _, to) = self.taped(operation);
        let result = tape.map(to).values.clone();
        let kept = inner(&tape, to);
        self.write(operation.to(), &result);
        if let (Operation::GatedResnet { c1, c2, .. }, Some(inner)) = (operation, kept) {
            self.write(*c1, &inner[0]);
            self.write(*c2, &inner[1]);
        }
    }

    fn backward(&mut self, number: usize) {
        let step = &self.plan.backward[number];
        let operation = &self.plan.forward[step.operation];
        let (tape, read, to) = self.taped(operation);
        // What an engine has kept is what comes out again.
        let kept = inner(&tape, to);
        if let (Operation::GatedResnet { c1, c2, .. }, Some(inner)) = (operation, kept) {
            assert_eq!(self.read(*c1).values, inner[0]);
            assert_eq!(self.read(*c2).values, inner[1]);
        }
        let mut gradients = self.gradients.clone();
        let by_maps = tape.backward(to, self.read(step.output).values, &mut gradients);
        self.gradients = gradients;
        let by_read: Vec<&Vec<f64>> = read.iter().map(|&map| &by_maps[map]).collect();
        if let Operation::GatedResnet { c2, .. } = operation {
            self.spoil(*c2);
            self.spoil(step.output);
        }
        for (gradient, by_map) in step.inputs.iter().zip(by_read) {
            let mut sum = by_map.clone();
            if gradient.accumulate {
                add(&mut sum, &self.read(gradient.buffer).values);
            }
            self.write(gradient.buffer, &sum);
        }
    }
}

/// What a block keeps: that before its second nonlinearity, and what its second convolution gives.
fn inner(tape: &Tape, block: usize) -> Option<[Vec<f64>; 2]> {
    let Origin::Gated(_, c2, _) = tape.maps[block].0 else {
        return None;
    };
    let Origin::Layer(_, mut c1) = tape.maps[c2].0 else {
        return None;
    };
    while let Origin::Dropped(_, x) | Origin::Bent(_, x) = tape.maps[c1].0 {
        c1 = x;
    }
    Some([c1, c2].map(|map| tape.map(map).values.clone()))
}

/// The steps in an order in which their turns may come, where one branch is carried out as early as
/// it may be.
fn order(turns: &[Turn], first: usize) -> Vec<usize> {
    let mut done = vec![false; turns.len()];
    let mut order = Vec::new();
    while order.len() < turns.len() {
        let may = |branch: usize| {
            let own = |step: &usize| turns[*step].branch == branch;
            let next = (0..turns.len()).filter(own).find(|&step| !done[step])?;
            let others = (0..next).filter(|step| !own(step)).all(|step| done[step]);
            (!turns[next].waits || others).then_some(next)
        };
        let next = may(first).or_else(|| may(1 - first));
        let next = next.expect("a step may always be next");
        done[next] = true;
        order.push(next);
    }
    order
}

#[test]
fn carried_out_in_any_order_plans_give_what_the_walk_gives() {
    let mut random = ChaCha8Rng::seed_from_u64(17);
    let drops = [Some(suite::DROPOUT), None].into_iter().cycle();
    let configs = [configs(), configs_of_codes(), configs_of_energy()].concat();
    for (config, dropout) in configs.iter().zip(drops) {
        let parameters = suite::widened(&parameters(config, &mut random));
        let images = Images::random(config, 2, &mut random);
        let batch = suite::batch(&images);
        let want = run(config, &parameters, batch, dropout).unwrap();
        let length = suite::norm(want.gradients.iter().flatten().copied());
        for plan in [Plan::evaluation(config), Plan::training(config)] {
            let steps: Vec<usize> = (0..plan.turns.len()).collect();
            let orders = [0, 1].map(|branch| order(&plan.turns, branch));
            if plan.d_logits.is_some() {
                assert!(orders.iter().all(|order| *order != steps));
            }
            let carried = |order: &[usize]| {
                let mut gradients: Vec<Vec<f64>> = Vec::new();
                gradients.extend(parameters.iter().map(|values| vec![0.0; values.len()]));
                let mut nats = Vec::new();
                for image in 0..2 {
                    let bytes = config.bytes_per_image();
                    let x = input(config, &images.levels[image * bytes..][..bytes]);
                    let mut carried = Carried {
                        plan: &plan,
                        config,
                        parameters: &parameters,
                        x: &x,
                        conditions: batch.conditions(config, image).collect(),
                        dropout: dropout.map(|dropout| (dropout, image)),
                        slots: plan.slots.iter().map(|&n| vec![f64::NAN; n]).collect(),
                        nats: 0.0,
                        gradients,
                    };
                    order.iter().for_each(|&step| carried.step(step));
                    nats.push(carried.nats);
                    gradients = carried.gradients;
                }
                (nats, gradients)
            };
            let (nats, gradients) = carried(&steps);
            assert_eq!(nats, want.nats);
            if plan.d_logits.is_some() {
                for (got, want) in gradients.iter().zip(&want.gradients) {
                    let apart = got.iter().zip(want).map(|(got, want)| got - want);
                    assert!(suite::norm(apart) <= 1e-12 * length);
                }
            }
            for order in orders {
                assert_eq!(carried(&order), (nats.clone(), gradients.clone()));
            }
        }
    }
}
