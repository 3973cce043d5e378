//! The names of the original's checkpoints. A training state holds, for each parameter in the
//! order of [`Layout`], `NAME` and `NAME/ExponentialMovingAverage`; and Adam's state under names
//! that say nothing: `Variable`, `Variable_1`, ... in creation order, for a class-conditional model
//! first an int64 array a GPU (the classes that it samples), then Adam's step count, then for each
//! parameter its second and its first moment.

use std::collections::BTreeMap;

use pixelcnn_core::engine::State;
use pixelcnn_core::network::{Layout, Parameter};
use pixelcnn_core::{ModelConfig, Nonlinearity};

use super::tensorflow::{Values, Variable};
use super::{Fault, Imported, Tensor, Tensors, Unsaid, WeightsError};

/// Behind a parameter's name that of its average.
pub(crate) const AVERAGE: &str = "/ExponentialMovingAverage";

/// TensorFlow's name for what was given none.
const UNNAMED: &str = "Variable";

/// Adam's step count is a float there, which counts no further.
const MAX_STEP: u64 = 1 << 24;

fn misfit(tensor: impl Into<String>, reason: impl Into<String>) -> Fault {
    Fault::Tensor {
        tensor: tensor.into(),
        reason: reason.into(),
    }
}

/// The model that parameters under the original's names make.
///
/// # Errors
/// Where they make none, or contradict `unsaid`.
pub fn config(tensors: &Tensors, unsaid: &Unsaid) -> Result<ModelConfig, Fault> {
    let shape = |name: &str| match tensors.get(name) {
        Some(tensor) => Ok(&tensor.shape[..]),
        None => Err(misfit(name, "is missing")),
    };
    let layers = |kind: &str| {
        let names = (0..).map(|n| format!("model/{kind}_{n}/V"));
        names.take_while(|name| tensors.contains_key(name)).count()
    };
    let directions = tensors.keys().filter(|name| {
        let layer = name
            .strip_suffix("/V")
            .and_then(|name| name.strip_prefix("model/"));
        layer.is_some_and(|layer| number(layer, "conv2d").is_some())
    });
    let [height, width] = unsaid.size.unwrap_or([32, 32]);

    let name = "model/conv2d_0/V";
    let &[2, 3, inputs @ (1..), nr_filters] = shape(name)? else {
        return Err(misfit(name, "is not a 2x3 convolution"));
    };
    // Of each block two convolutions, in two stacks: R blocks at each scale of the up pass; R, R + 1
    // and R + 1 in the down pass; and 7 convolutions outside of blocks. Where some are missing or too
    // many, the nearest R tells which.
    let nr_resnet = (directions.count().saturating_sub(15 - 12) / 24).max(1);
    // A projection in each block but those of the vertical stack's up pass.
    let last = 9 * nr_resnet + 4;
    // Behind it is the head of the energy distance.
    let energy_distance = layers("dense") > last + 1;
    let name = format!("model/dense_{last}/V");
    let &[_, outputs] = shape(&name)? else {
        return Err(misfit(name, "is not a dense layer"));
    };
    let name = "model/conv2d_3/V";
    let &[_, _, block_inputs, _] = shape(name)? else {
        return Err(misfit(name, "is not a convolution"));
    };
    let nonlinearity = match unsaid.nonlinearity {
        _ if block_inputs == Nonlinearity::ConcatElu.outputs(nr_filters) => Nonlinearity::ConcatElu,
        None => return Err(Fault::Nonlinearity),
        Some(said) => said,
    };
    if let Some(said) = unsaid.nonlinearity
        && said.outputs(nr_filters) != block_inputs
    {
        return Err(Fault::Contradiction {
            field: "nonlinearity",
            said: format!("{said:?}"),
            found: format!("{nonlinearity:?}"),
        });
    }
    let classes = "model/conditional_weights_0/hw";
    let nr_classes = match tensors.get(classes).map(|tensor| &tensor.shape[..]) {
        None => 0,
        Some(&[nr_classes @ (1..), _]) => nr_classes,
        Some(_) => return Err(misfit(classes, "is not a projection of classes")),
    };
    let mut config = ModelConfig {
        height,
        width,
        channels: inputs - 1,
        nr_resnet,
        nr_filters,
        nr_logistic_mix: 1,
        nonlinearity,
        nr_classes,
        energy_distance,
        ..ModelConfig::default()
    };
    config.nr_logistic_mix = match energy_distance {
        false => outputs / config.output_channels(),
        // It has no mixture.
        true => ModelConfig::default().nr_logistic_mix,
    };
    config.validate()?;
    Ok(config)
}

/// Takes an array of parameters out.
fn take(tensors: &mut Tensors, layout: &Layout, suffix: &str) -> Result<Vec<Vec<f32>>, Fault> {
    let parameters = layout.parameters.iter();
    let named = parameters.map(|parameter| (parameter, format!("{}{suffix}", parameter.name)));
    named
        .map(|(parameter, name)| {
            let tensor = tensors.remove(&name);
            expect(tensor, &name, &parameter.shape)
        })
        .collect()
}

fn expect(tensor: Option<Tensor>, name: &str, shape: &[usize]) -> Result<Vec<f32>, Fault> {
    match tensor {
        Some(tensor) if tensor.shape == shape => Ok(tensor.values),
        Some(tensor) => {
            let reason = format!("has shape {:?}, not {shape:?}", tensor.shape);
            Err(misfit(name, reason))
        }
        None => Err(misfit(name, "is missing")),
    }
}

/// Whose a tensor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Role {
    Parameter,
    Average,
    Optimizer,
}

/// What a tensor is to the model; its name without what a scope put before that; and that scope.
fn role(name: &str) -> Option<(Role, String, &str)> {
    if let Some((scope, name)) = unnamed(name) {
        return Some((Role::Optimizer, name.into(), scope));
    }
    let (parameter, role) = match name.strip_suffix(AVERAGE) {
        Some(parameter) => (parameter, Role::Average),
        None => (name, Role::Parameter),
    };
    let (layer, kind) = parameter.rsplit_once('/')?;
    let (_, layer) = split_scope(layer);
    const LAYERS: [&str; 4] = ["conv2d", "deconv2d", "dense", "conditional_weights"];
    let is_layer = LAYERS.iter().any(|kind| number(layer, kind).is_some());
    let is_parameter = ["V", "g", "b", "hw"].contains(&kind);
    let scope = &name[..parameter.len() - kind.len() - 1 - layer.len()];
    (is_layer && is_parameter).then(|| (role, format!("model/{layer}/{kind}"), scope))
}

/// What is before the last slash of a name, with it, and what is behind.
fn split_scope(name: &str) -> (&str, &str) {
    name.split_at(name.rfind('/').map_or(0, |slash| slash + 1))
}

/// The number n of a name `KIND_n`.
fn number(name: &str, kind: &str) -> Option<u64> {
    name.strip_prefix(kind)?.strip_prefix('_')?.parse().ok()
}

/// Scope and name of a variable to which no name was given.
fn unnamed(name: &str) -> Option<(&str, &str)> {
    let (scope, name) = split_scope(name);
    (name == UNNAMED || number(name, UNNAMED).is_some()).then_some((scope, name))
}

/// Whether no name was given to a variable, as the optimizer's.
pub(super) fn is_unnamed(name: &str) -> bool {
    unnamed(name).is_some()
}

/// Takes off what scopes put before the original's names: `tower_0/`, say, or another word for
/// `model`. Parameters, averages and the optimizer's state can have one each, which is that of most
/// of them; tensors with another one keep it. Averages alone are the parameters.
fn without_scopes(tensors: Tensors) -> Result<Tensors, Fault> {
    let mut counts: BTreeMap<(Role, &str), usize> = BTreeMap::new();
    for (role, _, scope) in tensors.keys().filter_map(|name| role(name)) {
        *counts.entry((role, scope)).or_default() += 1;
    }
    let mut scopes: BTreeMap<Role, (usize, String)> = BTreeMap::new();
    for (&(role, scope), &count) in &counts {
        if scopes.get(&role).is_none_or(|(most, _)| *most < count) {
            scopes.insert(role, (count, scope.into()));
        }
    }
    for ((role, scope), count) in counts {
        let (most, first) = &scopes[&role];
        if role != Role::Optimizer && count == *most && scope != first {
            return Err(Fault::Refused(format!(
                "it holds several models ({first:?}, {scope:?}): save one alone"
            )));
        }
    }
    let alone = !scopes.contains_key(&Role::Parameter);
    let mut named = Tensors::new();
    for (name, tensor) in tensors {
        let found = role(&name).filter(|(role, _, scope)| scopes[role].1 == *scope);
        let own = match found {
            None => name.clone(),
            Some((Role::Average, parameter, _)) if !alone => format!("{parameter}{AVERAGE}"),
            Some((_, own, _)) => own,
        };
        if named.insert(own, tensor).is_some() {
            return Err(misfit(name, "is there twice"));
        }
    }
    Ok(named)
}

/// What tensors under the original's names make, which may have a scope before
/// them. Without averages these begin with the parameters, averages alone are also the parameters,
/// and without Adam's state training begins at step 0.
///
/// # Errors
/// Where a tensor is missing, too many or of a wrong shape.
pub fn state(tensors: Tensors, unsaid: &Unsaid) -> Result<Imported, Fault> {
    let mut tensors = without_scopes(tensors)?;
    let config = config(&tensors, unsaid)?;
    let layout = Layout::new(&config);
    let parameters = take(&mut tensors, &layout, "")?;
    let averaged = tensors.keys().any(|name| name.ends_with(AVERAGE));
    let average = averaged.then(|| take(&mut tensors, &layout, AVERAGE));
    let average = average.transpose()?;
    let optimizer = optimizer(&mut tensors, &layout)?;
    if let Some(name) = tensors.into_keys().next() {
        return Err(misfit(name, "is not part of the model"));
    }
    Ok(assemble(config, parameters, average, optimizer))
}

/// What a file gives, from its parameters and what else there is of a training.
pub(super) fn assemble(
    config: ModelConfig,
    parameters: Vec<Vec<f32>>,
    average: Option<Vec<Vec<f32>>>,
    optimizer: Option<Adam>,
) -> Imported {
    let (step, [first, second]) = optimizer.unwrap_or_else(|| {
        let zeros = || parameters.iter().map(|p| vec![0.0; p.len()]).collect();
        (0, [zeros(), zeros()])
    });
    Imported {
        config,
        step,
        arrays: State {
            average: average.unwrap_or_else(|| parameters.clone()),
            parameters,
            first,
            second,
        },
        class_names: Vec::new(),
        origin: None,
        unused: Vec::new(),
    }
}

/// Steps taken, and the first and the second moments.
pub(super) type Adam = (u64, [Vec<Vec<f32>>; 2]);

/// The optimizer's variables that are floats, in creation order.
fn optimizer(tensors: &mut Tensors, layout: &Layout) -> Result<Option<Adam>, Fault> {
    let order = |name: &str| match name {
        UNNAMED => Some(0),
        name => number(name, UNNAMED),
    };
    let mut names: Vec<(u64, String)> = tensors
        .keys()
        .filter_map(|name| Some((order(name)?, name.clone())))
        .collect();
    names.sort_unstable();
    let mut names = names.into_iter().map(|(_, name)| name);
    let Some(count) = names.next() else {
        return Ok(None);
    };
    let mut next = |name: Option<String>, parameter: &Parameter, moment: &str| match name {
        Some(name) => expect(tensors.remove(&name), &name, &parameter.shape),
        None => {
            let reason = format!("has no {moment} moment among the optimizer's variables");
            Err(misfit(&parameter.name, reason))
        }
    };
    let (mut first, mut second) = (Vec::new(), Vec::new());
    for parameter in &layout.parameters {
        second.push(next(names.next(), parameter, "second")?);
        first.push(next(names.next(), parameter, "first")?);
    }
    // Adam's count is the number of the step to come.
    let next_step = expect(tensors.remove(&count), &count, &[])?;
    let next_step = f64::from(next_step.first().copied().unwrap_or_default());
    if next_step.fract() != 0.0 || !(1.0..=MAX_STEP as f64).contains(&next_step) {
        let reason = format!("is {next_step}, which is not Adam's number of a step");
        return Err(misfit(count, reason));
    }
    Ok(Some((next_step as u64 - 1, [first, second])))
}

/// All that the original's checkpoints hold of a training; arrays are in the order of [`Layout`].
#[derive(Debug, Clone, Copy)]
pub struct Optimized<'a> {
    /// The model.
    pub config: &'a ModelConfig,
    /// Optimizer steps taken.
    pub step: u64,
    /// The parameters.
    pub parameters: &'a [Vec<f32>],
    /// Their Polyak average.
    pub average: &'a [Vec<f32>],
    /// Adam's running mean of the gradient.
    pub first: &'a [Vec<f32>],
    /// And of its square.
    pub second: &'a [Vec<f32>],
}

/// A training state under the original's names; for a class-conditional model as the original
/// trains it on `nr_gpu` GPUs that share batches of `batch_size`.
///
/// # Errors
/// [`WeightsError::BeyondTheOriginal`], [`WeightsError::Gpus`].
pub fn variables(
    state: Optimized<'_>,
    batch_size: usize,
    nr_gpu: usize,
) -> Result<Vec<Variable<'_>>, WeightsError> {
    let mut later = state.config.later_settings();
    if let Some((setting, value, _)) = later.find(|(name, ..)| *name != "energy_distance") {
        return Err(WeightsError::BeyondTheOriginal { setting, value });
    }
    let layout = Layout::new(state.config);
    let mut variables = Vec::new();
    let mut unnamed = 0;
    let mut unnamed = move || {
        unnamed += 1;
        match unnamed - 1 {
            0 => UNNAMED.to_owned(),
            n => format!("{UNNAMED}_{n}"),
        }
    };
    let classes = state.config.nr_classes;
    if classes > 0 {
        if nr_gpu == 0 || !batch_size.is_multiple_of(nr_gpu) {
            return Err(WeightsError::Gpus { batch_size, nr_gpu });
        }
        let labels: Vec<i64> = (0..batch_size)
            .map(|image| (image % classes) as i64)
            .collect();
        for labels in labels.chunks(batch_size / nr_gpu) {
            variables.push(Variable {
                name: unnamed(),
                shape: vec![labels.len()],
                values: Values::Int64(labels.to_vec()),
            });
        }
    }
    let step = state.step.saturating_add(1).min(MAX_STEP);
    variables.push(Variable {
        name: unnamed(),
        shape: Vec::new(),
        values: Values::Float(vec![step as f32].into()),
    });
    for (i, parameter) in layout.parameters.iter().enumerate() {
        for (name, values) in [
            (unnamed(), &state.second[i]),
            (unnamed(), &state.first[i]),
            (parameter.name.clone(), &state.parameters[i]),
            (format!("{}{AVERAGE}", parameter.name), &state.average[i]),
        ] {
            variables.push(Variable {
                name,
                shape: parameter.shape.clone(),
                values: Values::Float(values.into()),
            });
        }
    }
    Ok(variables)
}
