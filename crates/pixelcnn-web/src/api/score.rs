//! `/v1/score`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use pixelcnn::score::LosslessFormat;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use utoipa::ToSchema;

use super::{ServerEvent, Teller, Turn, answer, model};
use crate::images::{Image, Levels};
use crate::limits;
use crate::models::Loaded;
use crate::problem::{AtMost, Body, Problem, Result, waiting};
use crate::tasks::{Measure, Measured, Task};
use crate::{App, memory};

/// Images to measure.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ScoreRequest {
    /// The model's name; the first one without.
    model: Option<String>,
    /// The images, of any sizes.
    #[schema(value_type = Vec<Image>, min_items = 1, max_items = 64)]
    images: AtMost<{ limits::IMAGES }, Image>,
    /// The class of all, of a class-conditional model.
    class: Option<u32>,
    /// Tell the bits of each pixel, too.
    #[serde(default)]
    maps: bool,
    /// Send events: `queue`, `done`.
    #[serde(default)]
    stream: bool,
}

/// How unusual images are.
#[derive(Debug, Serialize, ToSchema)]
pub struct Scored {
    /// The model's name.
    model: String,
    /// Of each image.
    scores: Vec<Score>,
}

/// How unusual an image is.
#[derive(Debug, Serialize, ToSchema)]
pub struct Score {
    /// Height and width.
    size: [usize; 2],
    /// What the model spends on it.
    bits_per_dim: f64,
    /// Of its PNG file.
    png_bits_per_dim: f64,
    /// Of its JPEG XL file.
    jpeg_xl_bits_per_dim: f64,
    /// `bits_per_dim` less those of the smaller file (Serrà et al., 2020): higher is more unusual.
    corrected: f64,
    /// Of each pixel the bits of all its channels together, [H][W].
    #[serde(skip_serializing_if = "Option::is_none")]
    bits_per_pixel: Option<Vec<Vec<f32>>>,
}

/// Measure how unusual images are.
#[utoipa::path(
    post,
    path = "/v1/score",
    request_body = ScoreRequest,
    responses(
        (status = 200, description = "The scores; with `stream` events", content(
            (Scored = "application/json"), (ServerEvent = "text/event-stream"))),
        (status = "4XX", description = "Not possible", body = Problem, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn score(
    State(app): State<Arc<App>>,
    Body(request): Body<ScoreRequest>,
) -> Result<Response> {
    let model = model(&app, request.model.clone()).await?;
    model.expect_likelihood()?;
    let class = model.class(request.class)?;
    let images = request.images.0;
    if images.is_empty() {
        return Err(Problem::unfit(format!(
            "no image: 1 to {} are measured at a time",
            limits::IMAGES
        )));
    }
    let channels = model.config().channels;
    let (maps, stream) = (request.maps, request.stream);
    let asked = Arc::clone(&model);
    let images = waiting(move || {
        let (mut found, mut pixels) = (Vec::new(), 0);
        for image in &images {
            let image = image.levels(channels)?;
            pixels += image.size[0] * image.size[1];
            asked.expect_few(pixels)?;
            found.push(image);
        }
        Ok(found)
    })
    .await?;
    let pixels: usize = images
        .iter()
        .map(|image| image.levels.len() / channels)
        .sum();
    // A map is written in some ten letters a pixel.
    let memory = memory(&app.made, pixels * (channels + if maps { 16 } else { 0 })).await?;
    let work = async move |teller| {
        let _memory = memory;
        measure(app, teller, model, images, class, maps).await
    };
    Ok(answer(stream, work).await)
}

async fn measure(
    app: Arc<App>,
    teller: Teller,
    model: Arc<Loaded>,
    mut images: Vec<Levels>,
    class: u32,
    maps: bool,
) -> Result<Scored> {
    // Those of a size together.
    let mut sizes: BTreeMap<[usize; 2], Vec<usize>> = BTreeMap::new();
    for (i, image) in images.iter().enumerate() {
        sizes.entry(image.size).or_default().push(i);
    }
    let mut scores: Vec<Option<Score>> = images.iter().map(|_| None).collect();
    for (size, numbers) in sizes {
        let (done, mut result) = oneshot::channel();
        let levels = numbers
            .iter()
            .map(|&i| std::mem::take(&mut images[i].levels));
        let ticket = app.room.submit(Task::Measure(Measure {
            model: Arc::clone(&model),
            size,
            images: levels.collect::<Vec<_>>().concat(),
            labels: vec![class; numbers.len()],
            done,
        }))?;
        let turn = Turn {
            ticket,
            teller: &teller,
        };
        let found = turn.wait(async { (&mut result).await.ok() }).await??;
        app.counters.images.inc_by(numbers.len() as u64);
        for (i, measured) in numbers.into_iter().zip(found) {
            let dims = size[0] * size[1] * model.config().channels;
            scores[i] = Some(Score::of(size, dims, measured, maps));
        }
    }
    Ok(Scored {
        model: model.name.clone(),
        scores: scores.into_iter().flatten().collect(),
    })
}

impl Score {
    fn of(size: [usize; 2], dims: usize, measured: Measured, maps: bool) -> Score {
        let bits = measured.bits_per_pixel.iter();
        let bits: f64 = bits.map(|bits| f64::from(*bits)).sum();
        let bits_per_dim = bits / dims as f64;
        let [png, jpeg_xl] = [LosslessFormat::Png, LosslessFormat::JpegXl]
            .map(|format| measured.files[format as usize]);
        let rows = measured.bits_per_pixel.chunks_exact(size[1]);
        Score {
            size,
            bits_per_dim,
            png_bits_per_dim: png,
            jpeg_xl_bits_per_dim: jpeg_xl,
            corrected: bits_per_dim - png.min(jpeg_xl),
            bits_per_pixel: maps.then(|| rows.map(<[f32]>::to_vec).collect()),
        }
    }
}
