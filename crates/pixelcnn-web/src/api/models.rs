//! `/v1/models`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use pixelcnn::train::config::RunConfig;
use serde::Serialize;
use utoipa::ToSchema;

use super::{Teller, alone, model};
use crate::App;
use crate::models::Source;
use crate::problem::{Problem, Result, waiting};
use crate::room::Flag;

/// A model that is served.
#[derive(Debug, Serialize, ToSchema)]
pub struct Served {
    /// The name that requests call it by.
    name: String,
    /// The size of the images that it was trained on.
    height: usize,
    /// The same.
    width: usize,
    /// 1 or 3.
    channels: usize,
    /// Of a class-conditional model; else 0.
    nr_classes: usize,
    /// Their names, where they have some.
    classes: Vec<String>,
    /// Whether it gives images a likelihood: else it only draws.
    likelihood: bool,
    /// What it was trained on, and how good it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    card: Option<Card>,
    /// Why it cannot be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

/// How a model came about.
#[derive(Debug, Serialize, ToSchema)]
pub struct Card {
    /// The model's name.
    name: String,
    /// The data that its run is for.
    data: String,
    /// Optimizer steps taken.
    step: u64,
    /// Images trained on, repeated ones counted again.
    images_seen: u64,
    /// How good it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    measured: Option<Measured>,
}

/// How good a model is.
#[derive(Debug, Serialize, ToSchema)]
pub struct Measured {
    /// Mean over the images.
    bits_per_dim: f64,
    /// Of that mean.
    #[serde(skip_serializing_if = "Option::is_none")]
    standard_error: Option<f64>,
    /// The images.
    images: String,
}

/// List the models that are served, the one that requests without a name mean first.
#[utoipa::path(
    get,
    path = "/v1/models",
    responses((status = 200, description = "The models", body = Vec<Served>))
)]
pub async fn models(State(app): State<Arc<App>>) -> Result<Json<Vec<Served>>> {
    let models = waiting(move || {
        app.look();
        let models = app.models.list().into_iter();
        Ok(models
            .map(|(name, source)| served(&app, name, &source))
            .collect())
    });
    models.await.map(Json)
}

/// What is known of a model; those of runs are not read for it.
fn served(app: &App, name: String, source: &Source) -> Served {
    let in_memory = app.models.in_memory();
    let loaded = match (
        source,
        in_memory.into_iter().find(|loaded| loaded.name == name),
    ) {
        (_, Some(loaded)) => Ok(loaded),
        (Source::Run(path), None) => match RunConfig::read(path) {
            Ok(file) => {
                let model = file.config.model;
                let problem = "the model is one of codes: it has no pictures to show";
                return Served {
                    name,
                    height: model.height,
                    width: model.width,
                    channels: model.channels,
                    nr_classes: model.nr_classes,
                    classes: Vec::new(),
                    likelihood: !model.energy_distance,
                    card: None,
                    problem: (model.nr_codes > 0).then(|| problem.into()),
                };
            }
            Err(error) => Err(Problem::unfit(error.to_string())),
        },
        _ => app.models.get(Some(&name)),
    };
    match loaded {
        Ok(loaded) => {
            let (config, card) = (loaded.config(), &loaded.model.card);
            Served {
                name,
                height: config.height,
                width: config.width,
                channels: config.channels,
                nr_classes: config.nr_classes,
                classes: loaded.classes.clone(),
                likelihood: loaded.expect_likelihood().is_ok(),
                card: Some(Card {
                    name: card.name.clone(),
                    data: card.data.clone(),
                    step: card.step,
                    images_seen: card.images_seen,
                    measured: card.measured.as_ref().map(|measured| Measured {
                        bits_per_dim: measured.bits_per_dim,
                        standard_error: measured.standard_error,
                        images: measured.images.clone(),
                    }),
                }),
                problem: None,
            }
        }
        Err(problem) => Served {
            name,
            height: 0,
            width: 0,
            channels: 0,
            nr_classes: 0,
            classes: Vec::new(),
            likelihood: false,
            card: None,
            problem: Some(problem.detail),
        },
    }
}

/// Quantiles of the scores of a test set.
#[derive(Debug, Serialize, ToSchema)]
pub struct Reference {
    /// The images.
    images: String,
    /// How many there are.
    count: usize,
    /// Of the model's bits/dim the quantiles from 0 to 1, at equal distances.
    bits_per_dim: Vec<f64>,
    /// The same of the corrected scores.
    corrected: Vec<f64>,
}

/// How images that a model should find usual score: those of the test set that it was trained for. Of a run the
/// first 500 are measured when this is first asked for.
#[utoipa::path(
    get,
    path = "/v1/models/{name}/reference",
    params(("name" = String, Path, description = "The model's name")),
    responses(
        (status = 200, description = "Quantiles of the scores", body = Reference),
        (status = "4XX", description = "Not known", body = Problem, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn reference(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<Json<Reference>> {
    let model = model(&app, Some(name)).await?;
    model.expect_likelihood()?;
    let known = Arc::clone(&model);
    let work = move |flag: &Flag, _: &mut dyn FnMut(f64)| known.reference(&mut || flag.go_on());
    let Some(found) = alone(&app, &Teller(None), Some(&model), work).await? else {
        let name = &model.name;
        return Err(Problem::missing(format!(
            "how usual images score is not known for `{name}`"
        )));
    };
    Ok(Json(Reference {
        images: found.images,
        count: found.count,
        bits_per_dim: found.bits_per_dim,
        corrected: found.corrected,
    }))
}
