use super::*;

fn summary() -> Summary {
    let mut latency_us = Histogram::new(3).expect("three digits");
    for millis in 1..=100 {
        latency_us.record(millis * 1_000).expect("it resizes");
    }
    Summary {
        orders: 1_595,
        confirmed: 1_400,
        cancelled: Cancelled { out_of_stock: 100, declined: 80, by_customer: 15, other: 0 },
        returns: 333,
        adjustments: 154,
        stuck: 0,
        parked: 0,
        charged: Decimal::new(83_977_222, 2),
        refunded: Decimal::new(758_645, 1),
        units: Units {
            initial: 372_703,
            sold: 368_150,
            returned: 16_274,
            adjusted: -1_709,
            remaining: 19_118,
            reserved: 0,
        },
        elapsed: Duration::from_millis(1_250),
        sagas: 1_928,
        latency_us,
        store: "sqlite:shop.db".into(),
        bus: "local:".into(),
        left_out: Tally { invoices: 2, rows: 7 },
        rejected: 1,
    }
}

#[test]
fn json_is_one_line_with_the_promised_fields_in_order() {
    let expected = concat!(
        r#"{"orders":1595,"confirmed":1400,"cancelled":{"out_of_stock":100,"declined":80,"by_customer":15},"#,
        r#""returns":333,"adjustments":154,"stuck":0,"charged":"839772.22","refunded":"75864.50","#,
        r#""units":{"initial":372703,"sold":368150,"returned":16274,"adjusted":-1709,"remaining":19118,"reserved":0},"#,
        r#""seconds":1.250,"sagas_per_second":1542.4,"latency_ms":{"p50":50.02,"p95":95.04,"p99":99.01},"#,
        r#""store":"sqlite:shop.db","bus":"local:","left_out":{"invoices":2,"rows":7},"rejected":1}"#
    );
    assert_eq!(summary().json(), expected);
}

#[test]
fn json_of_an_empty_run_has_numbers() {
    let nothing = Summary {
        sagas: 0,
        elapsed: Duration::ZERO,
        latency_us: Histogram::new(3).expect("three digits"),
        charged: Decimal::ZERO,
        store: "sqlite:a \"b\".db".into(),
        ..summary()
    };
    let json = nothing.json();
    assert!(json.contains(r#""charged":"0.00""#), "{json}");
    assert!(
        json.ends_with(
            r#""seconds":0.000,"sagas_per_second":0.0,"latency_ms":{"p50":0.00,"p95":0.00,"p99":0.00},"store":"sqlite:a \"b\".db","bus":"local:","left_out":{"invoices":2,"rows":7},"rejected":1}"#
        ),
        "{json}"
    );
    assert!(!nothing.human_on(Terminal::REDIRECTED).contains("latency"));
}

#[test]
fn units_are_conserved_or_not() {
    let sound = summary().units;
    assert!(sound.conserved());
    assert!(!Units { remaining: sound.remaining + 1, ..sound }.conserved());
    assert!(!Units { adjusted: 1_709, ..sound }.conserved());
    assert!(!Units { reserved: 1, ..sound }.conserved());
    assert!(!Units { initial: i64::MAX, sold: i64::MIN, ..sound }.conserved());
}

#[test]
fn summary_for_people_has_the_expected_text() {
    let text = summary().human_on(Terminal::new(60, false));
    for (name, value) in [
        ("orders", "1,595"),
        ("    out of stock", "100"),
        ("charged", "839,772.22"),
        ("refunded", "75,864.50"),
        ("  sold", "-368,150"),
        ("  returned", "+16,274"),
        ("  adjusted", "-1,709"),
        ("units at the end", "19,118"),
    ] {
        let line = format!("│ {name:<20}┆{value:>11} │");
        assert!(text.lines().any(|found| found == line), "{line:?} is not in\n{text}");
    }
    assert!(text.contains("\n✓ units conserved\n\n1,928 sagas in 1.250 s, 1,542 a second\n"), "{text}");
    assert!(text.contains("\nlatency: p50 50.0 ms, p95 95.0 ms, p99 99.0 ms\n"), "{text}");
    assert!(text.contains("\n  ≤ 50 ms "), "{text}");
}

#[test]
fn the_summary_fits_the_terminal() {
    let mut slow = summary();
    slow.latency_us.record_n(599_000_000, 1_234_567).expect("it resizes");
    slow.elapsed = Duration::from_secs(3_600);
    for summary in [summary(), slow] {
        for width in [40, 41, 50, 60, 80, 100] {
            for line in summary.human_on(Terminal::new(width, false)).lines() {
                assert!(line.chars().count() <= usize::from(width), "{width}: {line}");
            }
        }
    }
    assert_eq!(Terminal::new(10, false).width, 40);
    assert_eq!(Terminal::new(300, false).width, 100);
}

#[test]
fn long_times_are_grouped_too() {
    let mut slow = Summary { elapsed: Duration::from_millis(1_234_567), ..summary() };
    slow.latency_us.record_n(2_500_000, 1_000).expect("it resizes");
    let text = slow.human_on(Terminal::REDIRECTED);
    assert!(text.contains("1,928 sagas in 1,234.567 s, 1.6 a second"), "{text}");
    assert!(text.contains("latency: p50 2,500.6 ms, "), "{text}");
}

#[test]
fn colours_appear_only_on_a_terminal() {
    let faulty = Summary { stuck: 2, parked: 1_000, units: Units { reserved: 3, ..summary().units }, ..summary() };
    let plain = faulty.human_on(Terminal::REDIRECTED);
    assert!(!plain.contains('\x1b'));
    assert!(
        plain.contains("\n✗ units not conserved:\n  0 unexplained, 3 still reserved\n✗ 2 stuck\n✗ 1,000 parked\n"),
        "{plain}"
    );
    let coloured = faulty.human_on(Terminal::new(80, true));
    assert!(coloured.contains("\x1b[1;31m✗ 2 stuck\x1b[0m"), "{coloured}");
    assert!(summary().human_on(Terminal::new(80, true)).contains("\x1b[32m✓ units conserved\x1b[0m"));
}
