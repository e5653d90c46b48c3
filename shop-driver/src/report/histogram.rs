use std::fmt::Write;

use hdrhistogram::Histogram;

use super::{number::grouped, terminal::Terminal};

const EIGHTHS: [char; 8] = ['▏', '▎', '▍', '▌', '▋', '▊', '▉', '█'];
/// The width of a label such as `≤ 10 ms`.
const LABEL_WIDTH: usize = 9;
const COUNT_WIDTH: usize = 9;

/// Draws how many latencies lie between the steps 1, 2, 5, 10, … milliseconds, from the lowest to the highest latency.
pub(super) fn draw(latency: &Histogram<u64>, terminal: Terminal) -> String {
    let steps = steps(latency);
    let most = steps.iter().map(|(_, count)| *count).max().unwrap_or_default();
    let bar_width = usize::from(terminal.width).saturating_sub(LABEL_WIDTH + COUNT_WIDTH + 3);
    let mut text = String::new();
    for (below, count) in steps {
        let bar = bar(count, most, bar_width);
        let label = format!("≤ {}", duration(below));
        let line = format!("{label:>LABEL_WIDTH$} {bar:<bar_width$} {:>COUNT_WIDTH$}", grouped(count));
        let _ = writeln!(text, "{line}");
    }
    text
}

/// Returns the steps in microseconds, each with the number of latencies above the previous step and up to this step.
fn steps(latency: &Histogram<u64>) -> Vec<(u64, u64)> {
    let mut steps: Vec<(u64, u64)> = Vec::new();
    let mut step = 1;
    for recorded in latency.iter_recorded() {
        // The histogram treats close values as equal. The lowest of such values determines the step, so that 100 ms
        // belongs to the step up to 100 ms.
        let value = latency.lowest_equivalent(recorded.value_iterated_to());
        while value > step {
            // Leaves out empty steps before the first latency, but keeps empty steps between latencies.
            if !steps.is_empty() {
                step = next(step);
                steps.push((step, 0));
            } else {
                step = next(step);
            }
        }
        match steps.last_mut() {
            Some((_, count)) => *count += recorded.count_since_last_iteration(),
            None => steps.push((step, recorded.count_since_last_iteration())),
        }
    }
    steps
}

/// Returns the next step: 1, 2, 5, 10, 20, 50, …
fn next(step: u64) -> u64 {
    let mut leading = step;
    while leading >= 10 {
        leading /= 10;
    }
    let next = if leading == 2 { (step / 2).checked_mul(5) } else { step.checked_mul(2) };
    next.unwrap_or(u64::MAX)
}

fn duration(micros: u64) -> String {
    match micros {
        0..1_000 => format!("{micros} µs"),
        1_000..1_000_000 => format!("{} ms", micros / 1_000),
        _ => format!("{} s", micros / 1_000_000),
    }
}

/// Draws a bar in eighths of a character. Any count above zero is visible, even if the largest count is much larger.
fn bar(count: u64, most: u64, width: usize) -> String {
    if count == 0 || most == 0 {
        return String::new();
    }
    let eighths = (u128::from(count) * (width as u128) * 8 / u128::from(most)).max(1) as usize;
    let mut bar = "█".repeat(eighths / 8);
    if !eighths.is_multiple_of(8) {
        bar.push(EIGHTHS[eighths % 8 - 1]);
    }
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[(u64, u64)]) -> Histogram<u64> {
        let mut histogram = Histogram::new(3).expect("three digits");
        for (value, count) in values {
            histogram.record_n(*value, *count).expect("it resizes");
        }
        histogram
    }

    #[test]
    fn counts_between_steps() {
        let histogram = of(&[(1_500, 3), (2_000, 1), (2_010, 4), (20_000, 6), (40_000, 2)]);
        assert_eq!(steps(&histogram), [(2_000, 4), (5_000, 4), (10_000, 0), (20_000, 6), (50_000, 2)]);
        assert_eq!(steps(&of(&[])), []);
        assert_eq!(steps(&of(&[(0, 1), (1, 1)])), [(1, 2)]);
    }

    #[test]
    fn steps_are_1_2_5() {
        let steps: Vec<u64> = std::iter::successors(Some(1), |step| Some(next(*step))).take(8).collect();
        assert_eq!(steps, [1, 2, 5, 10, 20, 50, 100, 200]);
    }

    #[test]
    fn bars_are_in_proportion() {
        assert_eq!(bar(8, 8, 4), "████");
        assert_eq!(bar(4, 8, 4), "██");
        assert_eq!(bar(3, 8, 4), "█▌");
        assert_eq!(bar(1, 1_000_000, 4), "▏");
        assert_eq!(bar(0, 8, 4), "");
    }

    #[test]
    fn draws_within_the_width() {
        let histogram = of(&[(900, 10), (1_900, 1_234_567), (1_500_000, 5)]);
        let drawn = draw(&histogram, Terminal { width: 40, colours: false });
        let lines: Vec<&str> = drawn.lines().collect();
        assert_eq!(lines[0], "   ≤ 1 ms ▏                          10".to_owned());
        assert_eq!(lines[1], "   ≤ 2 ms ███████████████████ 1,234,567".to_owned());
        assert_eq!(lines.last(), Some(&"    ≤ 2 s ▏                           5"));
        assert_eq!(lines.len(), 11);
        assert!(lines.iter().all(|line| line.chars().count() <= 40));
    }
}
