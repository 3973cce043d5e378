//! Which flag to change where the library refuses: it speaks of settings, not of flags.

use std::error::Error;

use pixelcnn::data::DataError;
use pixelcnn::evaluate::WrongImages;
use pixelcnn::network::EngineError;
use pixelcnn::ranks::SharingError;
use pixelcnn::train::TrainError;
use pixelcnn::train::resume::ResumeError;
use pixelcnn::train::settings::SettingsError;
use pixelcnn::weights::{Fault, WeightsError};
use pixelcnn_web::ServeError;

/// What to add to an error's message.
pub fn advice(error: &(dyn Error + 'static)) -> String {
    let flag = match error.downcast_ref() {
        Some(error) => of_data(error),
        None if error.is::<WrongImages>() => Some("--size resizes pictures"),
        None => None,
    };
    let flag = flag.or_else(|| of_training(error.downcast_ref()?));
    let flag = flag.or_else(|| match error.downcast_ref()? {
        SettingsError::NoLabels { .. } => Some("leave --class-conditional out"),
        SettingsError::FewCodes {
            setting: "nr_codes",
            ..
        } => Some("--nr-codes"),
        SettingsError::FewCodes { .. } => Some("--nr-coarse-codes"),
        SettingsError::OtherImages { .. } => Some("--data"),
        SettingsError::Data(error) => of_data(error),
        _ => None,
    });
    let flag = flag.or_else(|| match error.downcast_ref()? {
        ResumeError::CheckpointsGone { .. } => Some("--from"),
        ResumeError::ImagesGone { .. } => Some("--data"),
        _ => None,
    });
    let flag = flag.or_else(|| match error.downcast_ref()? {
        ServeError::Address { .. } => Some("--port chooses another, 0 any that is free"),
        _ => None,
    });
    let flag = flag.or_else(|| match error.downcast_ref()? {
        WeightsError::Gpus { .. } => Some("--nr-gpu"),
        WeightsError::File { fault, .. } => match fault {
            Fault::Nonlinearity => Some("--nonlinearity"),
            Fault::Contradiction { field, .. } if *field == "nonlinearity" => {
                Some("leave --nonlinearity out")
            }
            Fault::Contradiction { .. } => Some("leave --image-size out"),
            _ => None,
        },
        _ => None,
    });
    flag.map(|flag| format!(" ({flag})")).unwrap_or_default()
}

fn of_training(error: &TrainError) -> Option<&'static str> {
    match error {
        TrainError::NotANumber { .. } => Some("--learning-rate"),
        TrainError::TooFewImages { .. } => Some("--batch-size"),
        TrainError::Engine(EngineError::Memory { .. }) => Some("--batch-size, or more --shards"),
        TrainError::Sharing(SharingError::TooFew(..)) => Some("--shards"),
        TrainError::Images(_) => Some("--size resizes pictures"),
        TrainError::Data(error) => of_data(error),
        _ => None,
    }
}

fn of_data(error: &DataError) -> Option<&'static str> {
    match error {
        DataError::Damaged(_) => Some("--skip-damaged"),
        DataError::MixedSizes { .. } => Some("--size, --crop"),
        DataError::Sides { .. } => Some("--size"),
        DataError::NoDataDir { .. } | DataError::Fetch { .. } => Some("--data-dir"),
        _ => None,
    }
}
