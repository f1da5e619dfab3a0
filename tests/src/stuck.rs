//! The `maskalign` command with a dataset that stops answering, as a file system may whose server has gone.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread::sleep,
    time::Duration,
};

use maskalign_core::prelude::*;

/// Grey images of which only so many can be read; the next one never comes.
#[component]
struct Stuck {
    /// Images that can be read.
    answers: usize,
}

struct Opened {
    answers: usize,
    asked: AtomicUsize,
}

impl Dataset for Stuck {
    fn open(&self) -> Result<Box<dyn Images>, Refusal> {
        Ok(Box::new(Opened { answers: self.answers, asked: AtomicUsize::new(0) }))
    }

    fn needs_files(&self) -> bool {
        false
    }
}

impl Images for Opened {
    fn len(&self) -> usize {
        64
    }

    fn image(&self, _: usize) -> Result<RgbImage, DataError> {
        while self.asked.fetch_add(1, Ordering::SeqCst) >= self.answers {
            sleep(Duration::from_secs(3600));
        }
        Ok(RgbImage::from_grey(28, 28, &[100; 784]))
    }

    fn label(&self, _: usize) -> Option<u32> {
        None
    }

    fn classes(&self) -> Option<Vec<String>> {
        None
    }

    fn name(&self, index: usize) -> String {
        format!("image {index}")
    }

    fn size(&self) -> Option<(usize, usize)> {
        Some((28, 28))
    }

    fn fingerprint(&self) -> String {
        "stuck".into()
    }
}

register!(dataset "stuck" => Stuck, "images that stop coming", example: "{ type: stuck, answers: 16 }");

fn main() -> std::process::ExitCode {
    maskalign_cli::main()
}
