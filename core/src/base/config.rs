//! Error messages about parameters of a URL.

/// An error message repeats at most this many characters of an unknown name.
const NAME_CHARS_MAX: usize = 40;

/// Returns an error message that names the unknown parameter, a likely alternative, and the known parameters.
///
/// ```
/// let reason = annals::config::unknown_parameter("shcema", &["pooled", "schema"]);
/// assert_eq!(reason, "the parameter `shcema` is unknown: did you mean `schema`? Known are pooled, schema");
/// ```
pub fn unknown_parameter(name: &str, known: &[&str]) -> String {
    let shown: String = name.chars().take(NAME_CHARS_MAX).collect();
    let plain = |name: &str| name.to_lowercase().replace(['_', '-', '.'], "");
    let distances = known.iter().map(|known| (distance(&plain(&shown), &plain(known)), known));
    // If several names are equally near, `min_by_key` returns the first.
    let nearest = distances.min_by_key(|(distance, _)| *distance);
    let meant = nearest.filter(|(distance, known)| *distance <= 2 && *distance < known.chars().count() / 2);
    let meant = meant.map_or(String::new(), |(_, known)| format!(": did you mean `{known}`?"));
    let end = if meant.is_empty() { "; known" } else { " Known" };
    format!("the parameter `{shown}` is unknown{meant}{end} are {}", known.join(", "))
}

/// Returns the edit distance between two strings: the number of characters that must be changed, added, removed or
/// swapped with a neighbour.
fn distance(left: &str, right: &str) -> usize {
    let left: Vec<char> = left.chars().collect();
    let right: Vec<char> = right.chars().collect();
    let mut rows: Vec<Vec<usize>> = vec![(0..=right.len()).collect()];
    for (i, a) in left.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, b) in right.iter().enumerate() {
            let replaced = rows[i][j] + usize::from(a != b);
            let mut best = replaced.min(rows[i][j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *a == right[j - 1] && left[i - 1] == *b {
                best = best.min(rows[i - 1][j - 1] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[left.len()][right.len()]
}
