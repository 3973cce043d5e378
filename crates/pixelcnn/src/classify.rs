//! Classes of images by Bayes' rule: a class-conditional model tells how likely an image is in each
//! class, and so how likely each class is for the image, all of them as likely beforehand.
//!
//! p(class | image) = p(image | class) / (sum over classes of p(image | class))

use std::ops::{ControlFlow, Range};

use pixelcnn_core::go_on;
use pixelcnn_core::incremental::EvaluatorError;
use serde::{Deserialize, Serialize};

use crate::data::Dataset;
use crate::evaluate::{EvaluateError, expect_images, in_batches};
use crate::network::{Batch, Network};

/// What a model makes of the classes of some images.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Classification {
    /// Nats of each image in each class, \[N, classes\]: minus ln p(image | class).
    pub nats: Vec<f64>,
    /// Classes of the model.
    pub nr_classes: usize,
    /// The images' own classes \[N\]; empty where the data have none, or not as many as the model.
    pub labels: Vec<u32>,
}

impl Classification {
    /// That of several sets of images, one after the other, as of one.
    pub fn concat(parts: Vec<Classification>) -> Classification {
        let mut whole = Classification::default();
        for part in parts {
            whole.nats.extend(part.nats);
            whole.labels.extend(part.labels);
            whole.nr_classes = part.nr_classes;
        }
        whole
    }

    /// Images that are classified.
    pub fn len(&self) -> usize {
        self.nats.len() / self.nr_classes.max(1)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.nats.is_empty()
    }

    /// The probability of each class for each image, \[N, classes\].
    pub fn probabilities(&self) -> Vec<f64> {
        let images = self.nats.chunks_exact(self.nr_classes.max(1));
        let of_image = |nats: &[f64]| {
            let least = nats.iter().copied().fold(f64::INFINITY, f64::min);
            let weights: Vec<f64> = nats.iter().map(|nats| (least - nats).exp()).collect();
            let sum: f64 = weights.iter().sum();
            weights.into_iter().map(move |weight| weight / sum)
        };
        images.flat_map(of_image).collect()
    }

    /// The likeliest class of each image \[N\], the first of equal ones.
    pub fn classes(&self) -> Vec<u32> {
        let images = self.nats.chunks_exact(self.nr_classes.max(1));
        let likeliest = |nats: &[f64]| {
            let classes = (0..).zip(nats);
            let least = classes.min_by(|(_, a), (_, b)| a.total_cmp(b));
            least.map_or(0, |(class, _)| class)
        };
        images.map(likeliest).collect()
    }

    /// How many images of each class were found to be of each, \[classes, classes\]: their own class by
    /// the row. All are 0 where the images have no classes.
    pub fn confusion(&self) -> Vec<usize> {
        let mut counts = vec![0; self.nr_classes * self.nr_classes];
        for (&label, found) in self.labels.iter().zip(self.classes()) {
            counts[label as usize * self.nr_classes + found as usize] += 1;
        }
        counts
    }

    /// The share of images whose likeliest class is their own; none where they have no classes.
    pub fn accuracy(&self) -> Option<f64> {
        let pairs = self.labels.iter().zip(self.classes());
        let right = pairs.filter(|(label, found)| *label == found).count();
        (!self.labels.is_empty()).then(|| right as f64 / self.labels.len() as f64)
    }
}

/// Classifies some images of a data set that follow one another, `batch_size` at a time. `progress` sees
/// what is classified so far after every batch and can stop it.
///
/// # Errors
/// [`EvaluateError::Unconditional`], where images can't be read or are not what the network takes, or
/// stopped.
pub fn classify(
    network: &mut Network,
    data: &Dataset,
    images: Range<usize>,
    batch_size: usize,
    progress: &mut dyn FnMut(&Classification) -> ControlFlow<()>,
) -> Result<Classification, EvaluateError> {
    let config = network.config();
    EvaluatorError::unless_likelihood(config)?;
    let nr_classes = config.nr_classes;
    if nr_classes == 0 {
        return Err(EvaluateError::Unconditional);
    }
    let has_classes = data.nr_classes() > 0 && expect_images(config, data).is_ok();
    let mut classification = Classification {
        nr_classes,
        ..Classification::default()
    };
    let order = in_batches(network, data, images, batch_size, |network, batch| {
        let count = batch.images.len() / network.config().bytes_per_image();
        let first = classification.nats.len();
        classification.nats.resize(first + count * nr_classes, 0.0);
        for class in 0..nr_classes {
            let labels = &vec![class as u32; count][..];
            let nats = network.nats_per_image(Batch { labels, ..batch })?;
            let of_class = classification.nats[first + class..].iter_mut();
            for (to, nats) in of_class.step_by(nr_classes).zip(nats) {
                *to = nats;
            }
        }
        if has_classes {
            classification.labels.extend(batch.labels);
        }
        Ok::<_, EvaluateError>(go_on(progress(&classification))?)
    })?;
    order.put(nr_classes, &mut classification.nats);
    order.put(1, &mut classification.labels);
    Ok(classification)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ModelConfig;
    use crate::data::DataConfig;
    use crate::device::Device;
    use crate::network::draw_parameters;

    #[test]
    fn likelier_classes_are_more_probable() {
        let classification = Classification {
            nats: vec![5000.0, 4999.0, 6000.0, 1.0, 1.0, 1e9],
            nr_classes: 3,
            labels: vec![1, 2],
        };
        let e = std::f64::consts::E;
        let [a, b] = [1.0 / (1.0 + e), e / (1.0 + e)];
        let expected = [a, b, 0.0, 0.5, 0.5, 0.0];
        for (got, want) in classification.probabilities().iter().zip(expected) {
            assert!((got - want).abs() < 1e-12, "{got}, {want}");
        }
        assert_eq!(classification.classes(), [1, 0]);
        assert_eq!(classification.confusion(), [0, 0, 0, 0, 1, 0, 1, 0, 0]);
        assert_eq!(classification.accuracy(), Some(0.5));
        let whole = Classification::concat(vec![classification.clone()]);
        assert_eq!(whole, classification);
        assert_eq!(Classification::default().accuracy(), None);
        assert!(Classification::default().classes().is_empty());
    }

    /// Nats are those of the images under each label, whatever the batches.
    #[test]
    fn every_class_is_tried() {
        let folder = tempfile::tempdir().unwrap();
        for (class, name) in ["cats", "dogs"].iter().enumerate() {
            std::fs::create_dir(folder.path().join(name)).unwrap();
            for image in 0..3 {
                let level = |x, y| [(70 * class as u32 + 9 * image + 5 * x + y) as u8; 3];
                let picture = image::RgbImage::from_fn(4, 4, |x, y| image::Rgb(level(x, y)));
                let path = folder.path().join(format!("{name}/{image}.png"));
                picture.save(path).unwrap();
            }
        }
        let data = DataConfig {
            data: folder.path().to_str().unwrap().into(),
            held_out: 0.0,
            ..DataConfig::default()
        };
        let data = Dataset::open(&data, crate::data::Split::Train).unwrap();
        let config = ModelConfig {
            height: 4,
            width: 4,
            nr_resnet: 1,
            nr_filters: 4,
            nr_logistic_mix: 1,
            nr_classes: 2,
            ..ModelConfig::default()
        };
        let parameters = draw_parameters(&config, 3);
        let mut network = Network::new(&config, &parameters, &Device::CPU).unwrap();
        let mut go_on = |_: &Classification| ControlFlow::Continue(());
        let found = classify(&mut network, &data, 0..6, 4, &mut go_on).unwrap();
        assert_eq!(
            (found.len(), &found.labels[..]),
            (6, &[0, 0, 0, 1, 1, 1][..])
        );
        let (mut images, mut labels) = (Vec::new(), Vec::new());
        data.read(&[0, 1, 2, 3, 4, 5], &mut images, &mut labels)
            .unwrap();
        for class in 0..2 {
            let batch = Batch {
                images: &images,
                labels: &[class as u32; 6],
                ..Batch::default()
            };
            let want = network.nats_per_image(batch).unwrap();
            let got: Vec<f64> = found.nats.iter().skip(class).step_by(2).copied().collect();
            assert_eq!(got, want);
        }
        let mut stop = |_: &Classification| ControlFlow::Break(());
        let stopped = classify(&mut network, &data, 0..6, 4, &mut stop);
        assert!(matches!(stopped, Err(EvaluateError::Stopped(_))));

        let config = ModelConfig {
            nr_classes: 0,
            ..config
        };
        let parameters = draw_parameters(&config, 3);
        let mut network = Network::new(&config, &parameters, &Device::CPU).unwrap();
        let refused = classify(&mut network, &data, 0..6, 4, &mut go_on);
        assert!(matches!(refused, Err(EvaluateError::Unconditional)));
    }
}
