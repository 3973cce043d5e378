//! `/v1/distribution`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use pixelcnn::likelihood::{ChannelMixture, Likelihood, Mixture, from_level};
use pixelcnn::network::Batch;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Teller, alone, model};
use crate::App;
use crate::images::{Image, Levels, expect_pixel};
use crate::models::Loaded;
use crate::problem::{Body, Problem, Result, waiting};

/// A pixel of an image.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DistributionRequest {
    /// The model's name; the first one without.
    model: Option<String>,
    /// The image; of what comes after the pixel nothing is looked at.
    image: Image,
    /// Its row and column.
    pixel: [usize; 2],
    /// The class, of a class-conditional model.
    class: Option<u32>,
}

/// What the model expects of a pixel, given all before it.
#[derive(Debug, Serialize, ToSchema)]
pub struct Distribution {
    /// The model's name.
    model: String,
    /// The levels that the pixel has.
    levels: Vec<u8>,
    /// Of each channel, given the pixel's own before it, the probability of each level from 0 to 255.
    probabilities: Vec<Vec<f64>>,
}

/// Tell what the model expects of a pixel, given all before it.
#[utoipa::path(
    post,
    path = "/v1/distribution",
    request_body = DistributionRequest,
    responses(
        (status = 200, description = "Probabilities", body = Distribution),
        (status = "4XX", description = "Not possible", body = Problem, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn distribution(
    State(app): State<Arc<App>>,
    Body(request): Body<DistributionRequest>,
) -> Result<Json<Distribution>> {
    let model = model(&app, request.model.clone()).await?;
    model.expect_likelihood()?;
    let class = model.class(request.class)?;
    let channels = model.config().channels;
    let image = waiting(move || request.image.levels(channels)).await?;
    let [row, column] = request.pixel;
    expect_pixel([row, column], image.size)?;
    model.expect_few((row + 1) * image.size[1])?;
    let asked = Arc::clone(&model);
    let work = move |_: &_, _: &mut dyn FnMut(f64)| expected(&model, &image, [row, column], class);
    alone(&app, &Teller(None), Some(&asked), work)
        .await
        .map(Json)
}

fn expected(
    model: &Loaded,
    image: &Levels,
    [row, column]: [usize; 2],
    class: u32,
) -> Result<Distribution> {
    let Likelihood::Mixture(mixture) = Likelihood::of(model.config()) else {
        return Err(Problem::unfit("the model is one of codes"));
    };
    let [width, channels] = [image.size[1], image.channels];
    // Nothing below tells the pixel anything.
    let above = &image.levels[..(row + 1) * width * channels];
    let logits = model.with_network([row + 1, width], |network| {
        let batch = Batch {
            images: above,
            labels: &[class],
            ..Batch::default()
        };
        network
            .logits(batch)
            .map_err(|error| Problem::unfit(error.to_string()))
    })?;
    let place = row * width + column;
    let each = mixture.logits_per_pixel();
    let logits = &logits[place * each..][..each];
    let levels = &image.levels[place * channels..][..channels];
    Ok(Distribution {
        model: model.name.clone(),
        levels: levels.to_vec(),
        probabilities: probabilities(&mixture, logits, levels),
    })
}

/// Of each channel the probability of each level, given those before it.
fn probabilities(mixture: &Mixture, logits: &[f32], levels: &[u8]) -> Vec<Vec<f64>> {
    let known: Vec<f32> = levels.iter().map(|level| from_level(*level)).collect();
    let mut one = ChannelMixture::default();
    let channels = (0..levels.len()).map(|channel| {
        mixture.next_channel(logits, &known[..channel], &mut one);
        let all = (0..=255).map(|level| f64::from(one.log_prob(from_level(level))).exp());
        all.collect()
    });
    channels.collect()
}

#[cfg(test)]
mod tests {
    use pixelcnn::ModelConfig;

    use super::*;

    #[test]
    fn probabilities_are_those_of_the_likelihood() {
        let config = ModelConfig {
            nr_logistic_mix: 4,
            ..ModelConfig::default()
        };
        let mixture = Mixture::of(&config);
        let logits: Vec<f32> = (0..mixture.logits_per_pixel())
            .map(|i| ((i * 37 % 23) as f32 - 11.0) / 7.0)
            .collect();
        let levels = [200, 0, 255];
        let found = probabilities(&mixture, &logits, &levels);
        let mut together = 1.0;
        for (channel, level) in found.iter().zip(levels) {
            assert!((channel.iter().sum::<f64>() - 1.0).abs() < 1e-4);
            together *= channel[usize::from(level)];
        }
        let x: Vec<f32> = levels.iter().map(|level| from_level(*level)).collect();
        let nats = f64::from(mixture.nats_per_pixel(&x, &logits)[0]);
        assert!((together.ln() + nats).abs() < 1e-4 * nats.abs());
    }
}
