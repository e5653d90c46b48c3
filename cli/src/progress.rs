//! How far it is, on a terminal; nothing elsewhere.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// How often the bar is drawn while nothing moves.
const TICK: Duration = Duration::from_millis(200);

/// A bar on standard error. `total` is what [`ProgressBar::position`] ends at.
pub(crate) fn bar(what: &'static str, total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    let template = "{prefix} {wide_bar:.cyan/blue} {human_pos}/{human_len}  {per_sec}  {eta} left";
    // Without its style a bar is still one: the template is no reason to fail.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_prefix(what);
    bar.enable_steady_tick(TICK);
    bar
}
