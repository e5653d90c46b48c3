use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

const TEMPLATE: &str = "{wide_bar:.cyan/dim} {human_pos}/{human_len}  {per_sec}  {eta}";
const TICK: Duration = Duration::from_millis(200);

/// A progress bar on standard error while the shop runs. Draws nothing if standard error is not a terminal.
#[derive(Clone, Debug)]
pub struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// Creates a bar with `total` steps. The bar is hidden if `quiet` is set or standard error is not a terminal.
    pub fn new(total: u64, quiet: bool) -> Self {
        Self::drawn(total, !quiet && io::stderr().is_terminal())
    }

    fn drawn(total: u64, visible: bool) -> Self {
        let target = if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        if visible {
            bar.set_style(ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.enable_steady_tick(TICK);
        }
        Self { bar }
    }

    /// Adds `steps` to the number of finished steps.
    pub fn inc(&self, steps: u64) {
        self.bar.inc(steps);
    }

    /// The number of finished steps.
    pub fn position(&self) -> u64 {
        self.bar.position()
    }

    /// Writes a line above the bar, or to standard error if the bar is hidden.
    pub fn say(&self, line: &str) {
        if self.bar.is_hidden() {
            eprintln!("{line}");
        } else {
            self.bar.println(line);
        }
    }

    /// Removes the bar before the summary is printed.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_stays_hidden_when_quiet() {
        let progress = Progress::new(10, true);
        progress.inc(3);
        progress.clone().inc(4);
        assert_eq!(progress.position(), 7);
        assert!(progress.bar.is_hidden());
        progress.finish();
        assert!(progress.bar.is_finished());
    }

    #[test]
    fn the_template_is_sound() {
        assert!(ProgressStyle::with_template(TEMPLATE).is_ok());
    }
}
