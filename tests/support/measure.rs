//! Durations measured in a test, and what they come to.

use std::time::Duration;

/// The same thing measured several times.
#[derive(Debug, Clone, Default)]
pub(crate) struct Samples(Vec<Duration>);

impl Samples {
    /// Adds one.
    pub(crate) fn add(&mut self, sample: Duration) {
        self.0.push(sample);
        self.0.sort_unstable();
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// The one in the middle.
    pub(crate) fn median(&self) -> Duration {
        self.percentile(50)
    }

    /// The longest.
    pub(crate) fn longest(&self) -> Duration {
        self.percentile(100)
    }

    /// The shortest.
    pub(crate) fn shortest(&self) -> Duration {
        self.percentile(0)
    }

    /// The one that so many percent do not exceed.
    pub(crate) fn percentile(&self, percent: usize) -> Duration {
        let last = self.0.len().checked_sub(1).expect("nothing was measured");
        self.0[(last * percent).div_ceil(100)]
    }

    /// Prints the distribution, for `--show-output`.
    pub(crate) fn report(&self, what: &str) {
        println!(
            "{what}: {} times, {:.1?} to {:.1?}, median {:.1?}, 90 % within {:.1?}",
            self.count(),
            self.shortest(),
            self.longest(),
            self.median(),
            self.percentile(90)
        );
    }
}

impl FromIterator<Duration> for Samples {
    fn from_iter<I: IntoIterator<Item = Duration>>(samples: I) -> Self {
        let mut samples: Vec<Duration> = samples.into_iter().collect();
        samples.sort_unstable();
        Self(samples)
    }
}
