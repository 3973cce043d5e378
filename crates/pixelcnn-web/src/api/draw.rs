//! `/v1/sample` and `/v1/complete`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use pixelcnn::complete::Completion;
use pixelcnn::sample::Sampling;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use utoipa::ToSchema;

use super::{ServerEvent, Teller, Turn, answer, model};
use crate::App;
use crate::images::{Format, Image, Levels, expect_pixel, text};
use crate::limits;
use crate::models::Loaded;
use crate::problem::{Body, Problem, Result, waiting};
use crate::tasks::{Draw, Task, What};

/// What to draw.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SampleRequest {
    /// The model's name; the first one without.
    model: Option<String>,
    /// Images.
    #[schema(minimum = 1, maximum = 64)]
    count: usize,
    /// The class of all images, of a class-conditional model; the classes in turn without.
    class: Option<u32>,
    /// 1 draws from the model; less draws likelier, smoother images.
    #[schema(exclusive_minimum = 0.0, maximum = 10.0)]
    temperature: f32,
    /// Image `i` is a function of the seed and `i`.
    #[schema(format = "uint64", maximum = 18446744073709551615_u64)]
    seed: u64,
    /// Height and width; those that the model was trained on without.
    size: Option<[usize; 2]>,
    /// How images come back.
    format: Format,
    /// Send events: `queue`, `rows` as they are drawn, `done`.
    stream: bool,
}

impl Default for SampleRequest {
    fn default() -> SampleRequest {
        SampleRequest {
            model: None,
            count: 1,
            class: None,
            temperature: 1.0,
            seed: 1,
            size: None,
            format: Format::default(),
            stream: false,
        }
    }
}

/// An image to complete.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CompleteRequest {
    /// The model's name; the first one without.
    model: Option<String>,
    /// The image; what is missing in it is not looked at.
    image: Image,
    /// What is known of it: one of the two.
    #[serde(default)]
    keep: Option<Keep>,
    /// A picture of the same size: black pixels are known, white ones are filled in.
    #[serde(default)]
    mask: Option<Image>,
    /// The class, of a class-conditional model.
    class: Option<u32>,
    /// Times that it is completed.
    #[serde(default = "four")]
    #[schema(minimum = 1, maximum = 64)]
    variants: usize,
    /// 1 draws from the model; less draws likelier, smoother images.
    #[serde(default = "one")]
    #[schema(exclusive_minimum = 0.0, maximum = 10.0)]
    temperature: f32,
    /// Variant `k` is a function of the seed and `k`.
    #[schema(format = "uint64", maximum = 18446744073709551615_u64)]
    #[serde(default = "first")]
    seed: u64,
    /// How images come back.
    #[serde(default)]
    format: Format,
    /// Send events: `queue`, `rows` as they are drawn, `done`.
    #[serde(default)]
    stream: bool,
}

fn four() -> usize {
    4
}

fn one() -> f32 {
    1.0
}

fn first() -> u64 {
    1
}

/// The pixels before this one are known: all rows above it, and those to its left.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Keep {
    /// Its row.
    row: usize,
    /// Its column.
    #[serde(default)]
    column: usize,
}

/// Images that were drawn.
#[derive(Debug, Serialize, ToSchema)]
pub struct Drawn {
    /// The model's name.
    model: String,
    /// Images, or variants of one.
    images: Vec<Image>,
    /// The class of each, of a class-conditional model.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    classes: Vec<u32>,
    /// From which they follow.
    seed: u64,
}

/// An event `rows`: the next row of all images, as far as they are drawn.
#[derive(Debug, Serialize, ToSchema)]
pub struct RowsDrawn {
    /// Its number.
    row: usize,
    /// Of each image its levels [W, C], in base64.
    rows: Vec<String>,
}

/// Draw images from a model.
#[utoipa::path(
    post,
    path = "/v1/sample",
    request_body = SampleRequest,
    responses(
        (status = 200, description = "The images; with `stream` events", content(
            (Drawn = "application/json"), (ServerEvent = "text/event-stream"))),
        (status = "4XX", description = "Not possible", body = Problem, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn sample(
    State(app): State<Arc<App>>,
    Body(request): Body<SampleRequest>,
) -> Result<Response> {
    let model = model(&app, request.model.clone()).await?;
    let config = model.config();
    let size = request.size.unwrap_or([config.height, config.width]);
    expect_drawable(&model, size, request.count, request.temperature)?;
    let labels = match (request.class, config.nr_classes) {
        (None, classes @ 1..) => (0..request.count).map(|i| (i % classes) as u32).collect(),
        (class, _) => vec![model.class(class)?; request.count],
    };
    let sampling = Sampling {
        labels: labels.clone(),
        temperature: request.temperature,
        seed: request.seed,
        coarse: Vec::new(),
    };
    let drawing = Drawing {
        size,
        count: request.count,
        labels,
        seed: request.seed,
        format: request.format,
        model,
        what: What::Sampling(sampling),
    };
    Ok(answer(request.stream, |teller| drawing.run(app, teller)).await)
}

/// Complete an image of which a part is known.
///
/// Each missing pixel is drawn given all pixels before it: those above it, and those to its left in its row.
/// The model cannot look ahead: what is known but comes later stays as it is, and tells what is drawn before it
/// nothing.
#[utoipa::path(
    post,
    path = "/v1/complete",
    request_body = CompleteRequest,
    responses(
        (status = 200, description = "The variants; with `stream` events", content(
            (Drawn = "application/json"), (ServerEvent = "text/event-stream"))),
        (status = "4XX", description = "Not possible", body = Problem, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn complete(
    State(app): State<Arc<App>>,
    Body(request): Body<CompleteRequest>,
) -> Result<Response> {
    let model = model(&app, request.model.clone()).await?;
    let class = model.class(request.class)?;
    let channels = model.config().channels;
    let (request, image, known) = waiting(move || {
        let image = request.image.levels(channels)?;
        let known = known(&request, image.size)?;
        Ok((request, image, known))
    })
    .await?;
    let size = image.size;
    expect_drawable(&model, size, request.variants, request.temperature)?;
    let completion = Completion {
        known,
        images: image.levels,
        labels: vec![class],
        variants: request.variants,
        temperature: request.temperature,
        seed: request.seed,
    };
    let labels = match model.config().nr_classes {
        0 => Vec::new(),
        _ => vec![class; request.variants],
    };
    let drawing = Drawing {
        size,
        count: request.variants,
        labels,
        seed: request.seed,
        format: request.format,
        model,
        what: What::Completion(completion),
    };
    Ok(answer(request.stream, |teller| drawing.run(app, teller)).await)
}

/// Which pixels are known \[H, W\].
fn known(request: &CompleteRequest, size: [usize; 2]) -> Result<Vec<bool>> {
    let [height, width] = size;
    let known: Vec<bool> = match (request.keep, &request.mask) {
        (Some(Keep { row, column }), None) => {
            expect_pixel([row, column], size)?;
            (0..height * width)
                .map(|pixel| pixel < row * width + column)
                .collect()
        }
        (None, Some(mask)) => {
            let mask = mask.levels(1)?;
            if mask.size != size {
                return Err(Problem::unfit(format!(
                    "the mask has {}x{} pixels, the image {width}x{height}: make them alike",
                    mask.size[1], mask.size[0]
                )));
            }
            mask.levels.iter().map(|level| *level < 128).collect()
        }
        _ => return Err(Problem::unfit("give either `keep` or `mask`")),
    };
    match known.iter().all(|known| *known) {
        true => Err(Problem::unfit("nothing is left to fill in: keep less")),
        false => Ok(known),
    }
}

fn expect_drawable(
    model: &Loaded,
    [height, width]: [usize; 2],
    count: usize,
    temperature: f32,
) -> Result<()> {
    let problem = |text: String| Err(Problem::unfit(text));
    if !(temperature > 0.0 && temperature <= 10.0) {
        return problem(format!(
            "`temperature` {temperature}: give a number above 0, up to 10"
        ));
    }
    if !(1..=limits::IMAGES).contains(&count) {
        return problem(format!(
            "{count} images: 1 to {} are drawn at a time",
            limits::IMAGES
        ));
    }
    let sides = 1..=limits::SIDE;
    if !(sides.contains(&height) && sides.contains(&width)) {
        return problem(format!(
            "{width}x{height} pixels: images of 1 to {} a side are drawn",
            limits::SIDE
        ));
    }
    match height * width * count {
        ..=limits::DRAWN => model.expect_few(height * width),
        pixels => problem(format!(
            "{pixels} pixels together: at most {} are drawn at a time",
            limits::DRAWN
        )),
    }
}

struct Drawing {
    model: Arc<Loaded>,
    size: [usize; 2],
    count: usize,
    labels: Vec<u32>,
    seed: u64,
    format: Format,
    what: What,
}

impl Drawing {
    async fn run(self, app: Arc<App>, teller: Teller) -> Result<Drawn> {
        let [height, width] = self.size;
        let config = self.model.config();
        let (sender, mut rows) = mpsc::unbounded_channel();
        let ticket = app.room.submit(Task::Draw(Draw {
            model: Arc::clone(&self.model),
            size: self.size,
            what: self.what,
            rows: sender,
        }))?;
        let turn = Turn {
            ticket,
            teller: &teller,
        };
        let length = width * config.channels;
        let mut images = vec![Vec::with_capacity(height * length); self.count];
        for row in 0..height {
            let levels = turn.wait(rows.recv()).await??;
            if row == 0 {
                app.counters.images.inc_by(self.count as u64);
            }
            let own = levels.chunks_exact(length);
            let rows = own.clone().map(text).collect();
            teller.tell("rows", &RowsDrawn { row, rows }).await;
            for (image, row) in images.iter_mut().zip(own) {
                image.extend_from_slice(row);
            }
        }
        let images = images.into_iter().map(|levels| {
            let image = Levels {
                size: self.size,
                channels: config.channels,
                levels,
            };
            Image::of(&image, self.format)
        });
        let classes = match config.nr_classes {
            0 => Vec::new(),
            _ => self.labels,
        };
        Ok(Drawn {
            images: images.collect::<Result<_>>()?,
            model: self.model.name.clone(),
            classes,
            seed: self.seed,
        })
    }
}
