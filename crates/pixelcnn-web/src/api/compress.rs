//! `/v1/compress` and `/v1/decompress`.

use std::io::Cursor;
use std::path::Path;
use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use pixelcnn::archive::{self, Archive, ArchiveError, CodingModel, Entry, Item, Reader};
use pixelcnn::codec::CodecError;
use pixelcnn::picture;
use pixelcnn::score::LosslessFormat;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{ServerEvent, alone, answer, model};
use crate::App;
use crate::images::{Image, bytes, text};
use crate::limits;
use crate::models::Loaded;
use crate::problem::{AtMost, Body, Problem, Result};
use crate::room::Flag;

/// Files to compress.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CompressRequest {
    /// The model's name; the first one without.
    model: Option<String>,
    /// The files: pictures of any size, and any others, which are kept as they are.
    #[schema(value_type = Vec<File>, min_items = 1, max_items = 1024)]
    files: AtMost<{ limits::FILES }, File>,
    /// Tell the sizes of each picture as PNG and as JPEG XL, too.
    #[serde(default)]
    compare: bool,
    /// Send events: `queue`, `progress`, `done`.
    #[serde(default)]
    stream: bool,
}

/// A file.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Its name: a relative path, its parts separated by `/`.
    #[schema(example = "photos/horse.png")]
    name: String,
    /// What is in it, in base64.
    #[schema(content_encoding = "base64")]
    data: String,
}

/// An archive.
#[derive(Debug, Serialize, ToSchema)]
pub struct Compressed {
    /// The model's name.
    model: String,
    /// The bytes of a .pxc file, in base64.
    #[schema(content_encoding = "base64")]
    archive: String,
    /// Its bytes.
    bytes: usize,
    /// Those of the files.
    original_bytes: usize,
    /// What became of each.
    files: Vec<Part>,
}

/// What became of a file.
#[derive(Debug, Serialize, ToSchema)]
pub struct Part {
    /// Its name.
    name: String,
    /// Its bytes as they came.
    original_bytes: usize,
    /// Those that the archive spends on its contents.
    bytes: u64,
    /// Whether it is a picture that the model coded: else it is kept as it was.
    coded: bool,
    /// Bytes as PNG, of a picture in 8 bits.
    #[serde(skip_serializing_if = "Option::is_none")]
    png_bytes: Option<usize>,
    /// Bytes as JPEG XL.
    #[serde(skip_serializing_if = "Option::is_none")]
    jpeg_xl_bytes: Option<usize>,
}

/// An archive to take the files out of.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DecompressRequest {
    /// The bytes of a .pxc file, in base64.
    #[schema(content_encoding = "base64")]
    archive: String,
    /// The name of the model that made it, where that is neither in it nor shipped nor in memory.
    model: Option<String>,
    /// Send events: `queue`, `progress`, `done`.
    #[serde(default)]
    stream: bool,
}

/// What was in an archive.
#[derive(Debug, Serialize, ToSchema)]
pub struct Decompressed {
    /// All of it, in its order.
    files: Vec<Taken>,
}

/// A file that was in an archive.
#[derive(Debug, Serialize, ToSchema)]
pub struct Taken {
    /// Its name.
    name: String,
    /// What is in it, in base64; of a picture that the model coded, a PNG file that shows the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(content_encoding = "base64")]
    data: Option<String>,
    /// Whether it is such a PNG.
    made: bool,
    /// Why it is lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    lost: Option<String>,
}

/// Compress files without loss.
#[utoipa::path(
    post,
    path = "/v1/compress",
    request_body = CompressRequest,
    responses(
        (status = 200, description = "The archive; with `stream` events", content(
            (Compressed = "application/json"), (ServerEvent = "text/event-stream"))),
        (status = "4XX", description = "Not possible", body = Problem, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn compress(
    State(app): State<Arc<App>>,
    Body(request): Body<CompressRequest>,
) -> Result<Response> {
    let model = model(&app, request.model.clone()).await?;
    model.expect_likelihood()?;
    let class = match model.config().nr_classes {
        0 => 0,
        _ => {
            return Err(Problem::unfit(
                "the model is class-conditional: choose another",
            ));
        }
    };
    if request.files.0.is_empty() {
        return Err(Problem::unfit("no files: give 1 to 1,024 at a time"));
    }
    let stream = request.stream;
    let work = move |flag: &Flag, tell: &mut dyn FnMut(f64)| {
        let mut items = Vec::new();
        for file in &request.files.0 {
            items.push(Item {
                name: file.name.clone(),
                class,
                bytes: bytes(&file.data, &format!("`data` of {}", file.name))?,
            });
        }
        compressed(&model, items, request.compare, flag, tell)
    };
    Ok(answer(stream, async move |teller| {
        alone(&app, &teller, None, work).await
    })
    .await)
}

fn compressed(
    model: &Loaded,
    items: Vec<Item>,
    compare: bool,
    flag: &Flag,
    tell: &mut dyn FnMut(f64),
) -> Result<Compressed> {
    let originals: Vec<(String, usize)> = items
        .iter()
        .map(|item| (item.name.clone(), item.bytes.len()))
        .collect();
    let coder = model.coder()?;
    let pixels = items.iter().filter_map(|item| {
        let [height, width] = picture::size(&item.bytes, Path::new(&item.name)).ok()?;
        Some(height as u64 * width as u64)
    });
    expect_few(pixels.sum())?;
    let sizes = items.iter().map(|item| match compare {
        true => as_others(&item.bytes, model.config().channels),
        false => [None; 2],
    });
    let sizes: Vec<[Option<usize>; 2]> = sizes.collect();
    let mut progress = |share| {
        tell(share);
        flag.go_on()
    };
    let file = archive::compress(&coder, items, &mut progress).map_err(unfit)?;
    let archive = Archive::new(Cursor::new(&file[..])).map_err(unfit)?;
    let parts = originals.iter().zip(archive.entries()).zip(sizes);
    let parts = parts.map(|(((name, original_bytes), entry), [png, jpeg_xl])| Part {
        name: name.clone(),
        original_bytes: *original_bytes,
        bytes: entry.bytes,
        coded: entry.size.is_some(),
        png_bytes: png,
        jpeg_xl_bytes: jpeg_xl,
    });
    Ok(Compressed {
        model: model.name.clone(),
        files: parts.collect(),
        bytes: file.len(),
        original_bytes: originals.iter().map(|(_, bytes)| bytes).sum(),
        archive: text(&file),
    })
}

/// Bytes of a picture as PNG and as JPEG XL, if it is one of 8 bits and not too large.
fn as_others(file: &[u8], channels: usize) -> [Option<usize>; 2] {
    let image = Image {
        picture: Some(text(file)),
        levels: None,
    };
    let Ok(image) = image.levels(channels) else {
        return [None; 2];
    };
    let shape = [image.size[0], image.size[1], channels];
    LosslessFormat::ALL.map(|format| {
        format
            .encode(&image.levels, shape)
            .ok()
            .map(|file| file.len())
    })
}

/// Take the files out of an archive.
#[utoipa::path(
    post,
    path = "/v1/decompress",
    request_body = DecompressRequest,
    responses(
        (status = 200, description = "The files; with `stream` events", content(
            (Decompressed = "application/json"), (ServerEvent = "text/event-stream"))),
        (status = "4XX", description = "Not possible", body = Problem, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn decompress(
    State(app): State<Arc<App>>,
    Body(request): Body<DecompressRequest>,
) -> Result<Response> {
    let room = Arc::clone(&app);
    let work = move |flag: &Flag, tell: &mut dyn FnMut(f64)| {
        let file = bytes(&request.archive, "`archive`")?;
        decompressed(&app, &file, request.model.as_deref(), flag, tell)
    };
    Ok(answer(request.stream, async move |teller| {
        alone(&room, &teller, None, work).await
    })
    .await)
}

fn decompressed(
    app: &App,
    file: &[u8],
    model: Option<&str>,
    flag: &Flag,
    tell: &mut dyn FnMut(f64),
) -> Result<Decompressed> {
    let mut reader = Reader::new(Cursor::new(file)).map_err(unfit)?;
    let (mut blocks, mut count, mut pixels) = (Vec::new(), 0, 0);
    // A few bytes can stand for very much.
    while let Some(block) = reader.next_block().map_err(unfit)? {
        count += block.entries().len();
        let sizes = block.entries().iter().filter_map(|entry| entry.size);
        pixels += sizes
            .map(|[height, width]| height as u64 * width as u64)
            .sum::<u64>();
        expect_few(pixels)?;
        if count > limits::FILES {
            return Err(Problem::unfit(format!(
                "an archive of over {} files: use `pixelcnn decompress`",
                limits::FILES
            )));
        }
        blocks.push(block);
    }
    let coder = match pixels {
        0 => None,
        _ => Some(coder_of(app, &mut reader, model)?),
    };
    let (mut files, mut done) = (Vec::new(), 0);
    for block in &blocks {
        let entries = block.entries();
        let all: Vec<usize> = (0..entries.len()).collect();
        let mut progress = |share: f64| {
            tell((done as f64 + share * all.len() as f64) / count.max(1) as f64);
            flag.go_on()
        };
        let found = reader.decode(block, &all, coder.as_deref(), &mut progress);
        files.extend(entries.iter().zip(found.map_err(unfit)?).map(taken));
        done += all.len();
    }
    Ok(Decompressed { files })
}

fn taken((entry, found): (&Entry, archive::Taken)) -> Taken {
    let (data, made, lost) = match found {
        Ok(found) => (Some(text(&found.bytes)), found.is_made, None),
        Err(damage) => (None, false, Some(damage.to_string())),
    };
    Taken {
        name: entry.name.clone(),
        data,
        made,
        lost,
    }
}

/// The model that an archive's pictures were coded with: it is named, or in memory, or the first one, or is in the
/// archive or in the program.
fn coder_of(
    app: &App,
    reader: &mut Reader<Cursor<&[u8]>>,
    name: Option<&str>,
) -> Result<Arc<CodingModel>> {
    let named = match name {
        Some(name) => Some(app.models.get(Some(name))?),
        None => app.models.get(None).ok(),
    };
    let models = named.into_iter().chain(app.models.in_memory());
    // Those without a likelihood code nothing.
    let mut coders = models.filter_map(|model| model.coder().ok());
    if let Some(coder) = coders.find(|coder| reader.expect_model(coder).is_ok()) {
        return Ok(coder);
    }
    let model = reader.find_model().map_err(unfit)?.ok_or_else(|| {
        Problem::unfit(format!(
            "the archive was made with another model, whose hash is {}: name it",
            reader.model()
        ))
    })?;
    let coder = model.coder();
    Ok(Arc::new(
        coder.map_err(|error| Problem::unfit(error.to_string()))?,
    ))
}

fn expect_few(pixels: u64) -> Result<()> {
    match pixels {
        ..=limits::CODED => Ok(()),
        _ => Err(Problem::unfit(format!(
            "pictures of over {} million pixels together: use `pixelcnn compress` and `pixelcnn \
             decompress`",
            limits::CODED / 1_000_000
        ))),
    }
}

fn unfit(error: ArchiveError) -> Problem {
    match error {
        ArchiveError::Codec(CodecError::Stopped(_)) => Flag::stopped(),
        error => Problem::unfit(error.to_string()),
    }
}
