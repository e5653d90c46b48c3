use super::number::grouped;
/// The remark for a run whose store already contains orders of its input.
pub fn repeated(count: u64) -> String {
    format!(
        "{} in the store already, from an earlier run; nothing was done twice",
        orders_and_returns(count, "was", "were")
    )
}

/// The remark for a stopped run. The remark names the store from which the next run continues.
pub fn stopped(unfinished: u64, kept_in: Option<&str>) -> String {
    let what = orders_and_returns(unfinished, "is", "are");
    let then = match kept_in {
        None => "lost with the store in memory".to_owned(),
        Some(place) => format!("kept in {place}: run the same command again to continue from there"),
    };
    format!("stopped: {what} unfinished, and {then}")
}

/// The remark for a stopped run against a remote shop. This process does not know how many invoices have reached that
/// shop.
pub fn stopped_there(under_way: u64, shop: &str) -> String {
    let what = orders_and_returns(under_way, "was", "were");
    format!("stopped: {what} under way at {shop}: run the same command again to continue from there")
}

fn orders_and_returns(count: u64, is: &str, are: &str) -> String {
    match count {
        1 => format!("1 order or return {is}"),
        _ => format!("{} orders and returns {are}", grouped(count)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remarks_have_the_expected_text() {
        assert_eq!(
            repeated(1),
            "1 order or return was in the store already, from an earlier run; nothing was done twice"
        );
        assert!(repeated(2_000).starts_with("2,000 orders and returns were in the store already, "));
        assert_eq!(
            stopped(1_234, Some("sqlite:shop.db")),
            "stopped: 1,234 orders and returns are unfinished, and kept in sqlite:shop.db: run the same command \
             again to continue from there"
        );
        assert_eq!(
            stopped_there(2, "http://127.0.0.1:8080"),
            "stopped: 2 orders and returns were under way at http://127.0.0.1:8080: run the same command again to \
             continue from there"
        );
        assert_eq!(stopped(1, None), "stopped: 1 order or return is unfinished, and lost with the store in memory");
    }
}
