//! `pixelcnn score`.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, value_parser};
use pixelcnn::Stopped;
use pixelcnn::atomic;
use pixelcnn::data::{DataConfig, Dataset, Listener};
use pixelcnn::device::Device;
use pixelcnn::evaluate::expect_images;
use pixelcnn::network::Network;
use pixelcnn::picture::DroppedCount;
use pixelcnn::score::{LosslessFormat, Map, Scores, auroc, maps, score};

use crate::chart::{Chart, Series, Shape};
use crate::device::DeviceFlags;
use crate::heat::{self, Group};
use crate::measuring::{ImageFlags, mean, share_out};
use crate::output::{Overwrite, make_folder};
use crate::ranks::{GpuFlags, Team, common, together};
use crate::terminal::{
    Result, catch_interrupts, counted, interrupted, note, note_dropped, opening, say,
};
use crate::trained::Trained;

/// The first line of the tables.
const COLUMNS: &str =
    "index,label,name,bits_per_dim,png_bits_per_dim,jpeg_xl_bits_per_dim,corrected";
/// What is written: the scores, and with --against and --maps more.
const FILES: [&str; 6] = [
    "scores.csv",
    "against.csv",
    "histogram.png",
    "corrected.png",
    "maps.png",
    "maps-against.png",
];
/// The images that are named in the terminal as the most unusual.
const NAMED: usize = 5;

/// Measure how unusual images are.
///
/// An image that the model spends many bits on is unlike those that it was trained on, or it is just
/// complex: the likelihood alone finds simple images usual whatever they show. So the size of the
/// image's PNG or JPEG XL file, whichever is smaller, is taken off (Serrà et al., 2020): what is
/// left is higher the more unusual an image is.
///
/// Writes a folder: scores.csv has each image's bits/dim under the model, as PNG, as JPEG XL, and
/// the corrected ones; histogram.png and corrected.png show how the first and the last are spread.
/// Of earlier scores in it nothing stays.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
#[command(override_usage = "pixelcnn score [OPTIONS] [RUN|FILE] <DATA>")]
pub struct Score {
    /// Run folder (its newest checkpoint), checkpoint file or exported weights [default: the
    /// shipped model]; then the images: cifar10, imagenet32, imagenet64, or the path of a folder or
    /// .tar of pictures, or of a .npy or .npz file
    #[arg(value_name = "FILES", required = true)]
    files: Vec<PathBuf>,
    /// Other images, given as DATA is: tells how well the scores find them among those of DATA, and
    /// writes against.csv as well
    #[arg(long, value_name = "DATA")]
    against: Option<PathBuf>,
    #[command(flatten)]
    images: ImageFlags,
    /// Cut the largest centred square out of each picture and resize it to this side [default:
    /// pictures as they are]
    #[arg(long, value_name = "PIXELS")]
    size: Option<usize>,
    /// Folder in which cifar10, imagenet32 or imagenet64 lies [default: the user's cache, into
    /// which cifar10 is fetched]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Draw the N most and the N least unusual images beside heat maps of their bits per pixel, in
    /// maps.png, those of --against in maps-against.png [default: none]
    #[arg(long, value_name = "N", value_parser = value_parser!(u16).range(1..=1_000))]
    maps: Option<u16>,
    /// Leave damaged pictures out instead of refusing all; each is decoded once to find out
    #[arg(long)]
    skip_damaged: bool,
    /// Folder for all files [default: scores, or scores-2 and so on where that is there]
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    #[command(flatten)]
    overwrite: Overwrite,
    #[command(flatten)]
    ranks: GpuFlags,
}

const EXAMPLES: &str = "\
Examples:
  pixelcnn score runs/quick-1 photos --size 32
      how unusual each picture in a folder is, in scores/scores.csv
  pixelcnn score runs/quick-1 cifar10 --limit 1000 --maps 12
      with pictures of where the unusual ones are unusual, in scores/maps.png
  pixelcnn score runs/quick-1 cifar10 --against photos --size 32 -o unlike
      how well the score tells the two sets apart, and their histograms";

/// What scores need.
struct Prepared {
    device: Device,
    trained: Trained,
    network: Network,
    /// Data sets by their names, and how many images of each.
    sets: Vec<(String, Dataset, usize)>,
    output: PathBuf,
    batch_size: usize,
}

/// A data set with its scores.
struct Scored {
    /// As it was given, with the split.
    name: String,
    data: Dataset,
    scores: Scores,
    /// Corrected by the smallest file.
    corrected: Vec<f64>,
}

impl Score {
    /// Runs the command, as one of the ranks that share the images.
    pub fn run(&self, device: &DeviceFlags) -> Result<ExitCode> {
        together(self.ranks, |team| self.score(device, team))
    }

    fn score(&self, device: &DeviceFlags, team: &Team) -> Result<ExitCode> {
        let common = |prepared: &Prepared| {
            let Prepared {
                trained,
                device,
                sets,
                ..
            } = prepared;
            let data: Vec<&Dataset> = sets.iter().map(|(_, data, _)| data).collect();
            common(self, trained, self.images.raw, *device, &data)
        };
        let Prepared {
            trained,
            mut network,
            sets,
            output,
            batch_size,
            ..
        } = team.prepare(|| self.prepare(device, team), common)?;
        let mut scored = Vec::new();
        for (name, data, count) in sets {
            let parts = share_out(&*team.ranks, count, |own, progress| {
                let mut progress = |so_far: &Scores| {
                    let likelihood = &so_far.likelihood;
                    progress(likelihood.bits_per_dim.len(), &mean(likelihood))
                };
                Ok(score(&mut network, &data, own, batch_size, &mut progress)?)
            })?;
            let scores = Scores::concat(parts);
            let corrected = scores.corrected(&LosslessFormat::ALL);
            scored.push(Scored {
                name,
                data,
                scores,
                corrected,
            });
        }
        if !team.leads() {
            return Ok(ExitCode::SUCCESS);
        }
        let mut pictures = Vec::new();
        if let Some(n) = self.maps {
            for set in &scored {
                pictures.push(self.groups(&mut network, set, n.into(), batch_size)?);
            }
        }

        self.remove_earlier(&output)?;
        for (set, name) in scored.iter().zip(["scores.csv", "against.csv"]) {
            let path = output.join(name);
            write_table(&path, set)
                .map_err(|error| format!("cannot write `{}`: {error}", path.display()))?;
        }
        let likelihoods = |set: &Scored| set.scores.likelihood.bits_per_dim.clone();
        let corrected = |set: &Scored| set.corrected.clone();
        for (file, x_label, of) in [
            (
                "histogram.png",
                "bits/dim",
                &likelihoods as &dyn Fn(&Scored) -> Vec<f64>,
            ),
            (
                "corrected.png",
                "bits/dim less those of the smaller file",
                &corrected,
            ),
        ] {
            let sets = scored.iter().map(|set| (set.name.clone(), of(set)));
            histogram(sets.collect(), x_label).write(&output.join(file))?;
        }
        let tops = pictures.iter().map(|groups| heat::top(groups));
        let top = tops.reduce(f32::max);
        for (groups, name) in pictures.iter().zip(["maps.png", "maps-against.png"]) {
            heat::write(&output.join(name), groups, top.unwrap_or(1.0))?;
        }

        for set in &scored {
            summary(set)?;
        }
        if let [usual, unusual] = &scored[..] {
            comparison(usual, unusual)?;
        }
        let scale = top.map(|top| format!(", heat maps from 0 to {top:.1} bits/pixel"));
        say(format_args!(
            "in {}{} ({} weights, step {})",
            output.display(),
            scale.unwrap_or_default(),
            trained.kind(self.images.raw),
            trained.step()
        ))?;
        Ok(ExitCode::SUCCESS)
    }

    fn prepare(&self, device: &DeviceFlags, team: &Team) -> Result<Prepared> {
        let device = device.find_for(team)?;
        let (trained, rest) = Trained::open_first(&self.files, "score")?;
        trained.expect_likelihood_of_images("score")?;
        let [data] = rest else {
            return Err(format!(
                "{} data sets beside the model: give one, and another with --against",
                rest.len()
            )
            .into());
        };
        let model = trained.model();
        let output = self.overwrite.or_free(&self.output, "scores");
        if team.leads() {
            for file in FILES {
                self.overwrite.expect_free(&output.join(file))?;
            }
        }
        let network = trained.network(self.images.raw, &device)?;
        let (mut sets, mut dropped) = (Vec::new(), DroppedCount::default());
        let mut listener = opening();
        for data in [Some(data), self.against.as_ref()].into_iter().flatten() {
            let (name, data) = self.open(data, &trained, &mut listener)?;
            dropped += data.dropped();
            if team.leads() {
                trained.note_sizes(&data);
            }
            expect_images(model, &data)?;
            let count = self.images.count(&data);
            if let Some(n) = self.maps {
                let n = usize::from(n).min(count);
                heat::fits(data.largest(), &[n, n])
                    .map_err(|error| format!("--maps {n}: {error}"))?;
            }
            sets.push((name, data, count));
        }
        note_dropped(dropped);
        if team.leads() {
            catch_interrupts("leaving after this batch")?;
            make_folder(&output)?;
        }
        Ok(Prepared {
            device,
            trained,
            network,
            sets,
            output,
            batch_size: self.images.batch_size(&device),
        })
    }

    /// Opens what is given as DATA, and names it.
    fn open(
        &self,
        data: &Path,
        trained: &Trained,
        listener: &mut Listener,
    ) -> Result<(String, Dataset)> {
        let name = data.to_str();
        let name = name.ok_or_else(|| format!("{}: not UTF-8: rename it", data.display()))?;
        let short = shortened(name);
        let mut config = DataConfig {
            data: name.into(),
            data_dir: self.data_dir.clone(),
            size: self.size,
            skip_damaged: self.skip_damaged,
            ..DataConfig::default()
        };
        config.make_absolute();
        if let Some(own) = trained.data().filter(|_| trained.is_own(&config)) {
            config = DataConfig {
                data_dir: config.data_dir.or(own.data_dir.clone()),
                size: config.size.or(own.size),
                skip_damaged: config.skip_damaged || own.skip_damaged,
                ..own.clone()
            };
        }
        let (split, data) = trained.open_measured(&config, self.images.split, listener)?;
        let split = split.map(|split| format!(" {split}"));
        Ok((short + &split.unwrap_or_default(), data))
    }

    /// Removes what earlier scores left in the folder and these, which are forced, do not replace: it
    /// would be taken for theirs.
    fn remove_earlier(&self, output: &Path) -> Result {
        let is_table = |name| {
            let mut start = String::new();
            let file = File::open(output.join(name));
            file.and_then(|file| file.take(COLUMNS.len() as u64).read_to_string(&mut start))
                .is_ok()
                && start == COLUMNS
        };
        // Files of the same names in any other folder are not ours.
        if !["scores.csv", "against.csv"].into_iter().any(is_table) {
            return Ok(());
        }
        let (against, maps) = (self.against.is_some(), self.maps.is_some());
        let mut removed = Vec::new();
        for (name, replaced) in [
            ("against.csv", against),
            ("maps.png", maps),
            ("maps-against.png", against && maps),
        ] {
            let path = output.join(name);
            if !replaced && path.is_file() {
                fs::remove_file(&path)
                    .map_err(|error| format!("cannot remove `{}`: {error}", path.display()))?;
                removed.push(name);
            }
        }
        if !removed.is_empty() {
            note(format_args!(
                "{}: removed {} of earlier scores",
                output.display(),
                removed.join(", ")
            ));
        }
        Ok(())
    }

    /// The heat maps of the `n` most and least unusual images.
    fn groups(
        &self,
        network: &mut Network,
        set: &Scored,
        n: usize,
        batch_size: usize,
    ) -> Result<Vec<Group>> {
        let most = set.most_unusual();
        let least: Vec<usize> = most.iter().rev().copied().collect();
        let mut groups = Vec::new();
        for (title, indices) in [("Most unusual", most), ("Least unusual", least)] {
            let mut images: Vec<(String, Map)> = Vec::new();
            for indices in indices[..n.min(indices.len())].chunks(batch_size) {
                let maps = maps(network, &set.data, indices, batch_size)?;
                images.extend(indices.iter().map(|&image| set.caption(image)).zip(maps));
                if interrupted().is_break() {
                    return Err(Stopped.into());
                }
            }
            let title = format!("{title}: number, bits/dim (corrected)");
            groups.push(Group { title, images });
        }
        Ok(groups)
    }
}

impl Scored {
    /// The images' indices, the most unusual one first.
    fn most_unusual(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.corrected.len()).collect();
        order.sort_by(|&a, &b| self.corrected[b].total_cmp(&self.corrected[a]));
        order
    }

    /// The line above an image.
    fn caption(&self, image: usize) -> String {
        format!(
            "{image}   {:.2} ({:+.2})",
            self.scores.likelihood.bits_per_dim[image], self.corrected[image]
        )
    }
}

/// The end of a long path, so that it has its place in a legend.
fn shortened(path: &str) -> String {
    const LONG: usize = 32;
    match path.chars().count() {
        0..=LONG => path.into(),
        count => format!("…{}", path.chars().skip(count - LONG).collect::<String>()),
    }
}

/// Writes the scores of every image.
fn write_table(path: &Path, set: &Scored) -> io::Result<()> {
    let mut table = csv::Writer::from_writer(Vec::new());
    table.write_record(COLUMNS.split(','))?;
    for (image, corrected) in set.corrected.iter().enumerate() {
        let likelihood = &set.scores.likelihood;
        let label = likelihood.labels.get(image);
        table.serialize((
            image,
            label.map_or(-1, |&label| i64::from(label)),
            set.data.image_name(image).unwrap_or_default(),
            likelihood.bits_per_dim[image],
            set.scores.complexity(LosslessFormat::Png)[image],
            set.scores.complexity(LosslessFormat::JpegXl)[image],
            corrected,
        ))?;
    }
    let table = table.into_inner().map_err(|error| error.into_error())?;
    atomic::write(path, |w| w.write_all(&table))
}

/// How the scores of one or two sets are spread: images, or for two sets, which may differ in size,
/// the share of each.
fn histogram(sets: Vec<(String, Vec<f64>)>, x_label: &str) -> Chart {
    let all = sets.iter().flat_map(|(_, scores)| scores.iter().copied());
    let finite: Vec<f64> = all.filter(|score| score.is_finite()).collect();
    let least = finite.iter().copied().fold(f64::INFINITY, f64::min);
    let most = finite.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let bins = (finite.len() / sets.len().max(1)).isqrt().clamp(10, 50);
    // A bar for equal scores is narrow, but there.
    let width = ((most - least) / bins as f64).max(1e-3);
    let share = sets.len() > 1;
    let series = sets.into_iter().map(|(label, scores)| {
        let unit = if share {
            100.0 / scores.len() as f64
        } else {
            1.0
        };
        let mut heights = vec![0.0; bins];
        for score in scores.iter().filter(|score| score.is_finite()) {
            heights[(((score - least) / width) as usize).min(bins - 1)] += unit;
        }
        let edges = (0..=bins).map(|edge| least + edge as f64 * width).collect();
        Series {
            label,
            shape: Shape::Bars { edges, heights },
        }
    });
    Chart {
        title: "How unusual the images are".into(),
        x_label: x_label.into(),
        y_label: if share {
            "% of the set's images"
        } else {
            "images"
        }
        .into(),
        series: series.collect(),
    }
}

/// Prints the means of a set, and its most unusual images.
fn summary(set: &Scored) -> Result {
    let likelihood = &set.scores.likelihood;
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    say(format_args!(
        "{}: {}  {:.4} ± {:.4} bits/dim  PNG {:.4}  JPEG XL {:.4}  corrected {:+.4}",
        set.name,
        counted(set.corrected.len(), "image"),
        likelihood.mean(),
        likelihood.standard_error(),
        mean(set.scores.complexity(LosslessFormat::Png)),
        mean(set.scores.complexity(LosslessFormat::JpegXl)),
        mean(&set.corrected)
    ))?;
    let named = set.most_unusual().into_iter().take(NAMED).map(|image| {
        let name = set.data.image_name(image).map(|name| format!(" {name}"));
        format!(
            "{image}{} ({:+.2})",
            name.unwrap_or_default(),
            set.corrected[image]
        )
    });
    say(format_args!(
        "  most unusual: {}",
        named.collect::<Vec<_>>().join(", ")
    ))
}

/// Prints how well each score tells two sets apart.
fn comparison(usual: &Scored, unusual: &Scored) -> Result {
    say(format_args!(
        "AUROC, how often an image of {} scores as more unusual than one of {} (0.5: can't tell; \
         1: always):",
        unusual.name, usual.name
    ))?;
    for (name, formats) in [
        ("likelihood alone", &[][..]),
        ("corrected by PNG", &[LosslessFormat::Png]),
        ("corrected by JPEG XL", &[LosslessFormat::JpegXl]),
        ("corrected by the smaller", &LosslessFormat::ALL),
    ] {
        let auroc = auroc(
            &usual.scores.corrected(formats),
            &unusual.scores.corrected(formats),
        );
        say(format_args!("  {name:24} {auroc:.3}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_count_every_score() {
        let a = vec![0.0, 1.0, 1.0, 2.0, f64::NAN];
        let heights = |chart: &Chart, set: usize| match &chart.series[set].shape {
            Shape::Bars { edges, heights } => {
                assert_eq!(edges.len(), heights.len() + 1);
                assert!(edges[0] <= 0.0 && edges[heights.len()] >= 2.0 - 1e-9);
                heights.clone()
            }
            Shape::Line(_) => unreachable!(),
        };
        let alone = histogram(vec![("a".into(), a.clone())], "bits/dim");
        let alone = heights(&alone, 0);
        assert_eq!(alone.iter().sum::<f64>(), 4.0);
        assert_eq!([alone[0], alone[5], alone[9]], [1.0, 2.0, 1.0]);
        let two = histogram(
            vec![("a".into(), a), ("b".into(), vec![2.0; 100])],
            "bits/dim",
        );
        let b = heights(&two, 1);
        assert!((b[b.len() - 1] - 100.0).abs() < 1e-9);
        histogram(vec![("a".into(), vec![f64::NAN])], "bits/dim");
        histogram(vec![("a".into(), vec![7.0; 3])], "bits/dim");
    }

    #[test]
    fn long_paths_keep_their_end() {
        assert_eq!(shortened("photos"), "photos");
        let short = shortened("a/very/long/path/ünder/which/there/are/photos");
        assert!(short.ends_with("are/photos") && short.starts_with('…'));
        assert_eq!(short.chars().count(), 33);
    }
}
