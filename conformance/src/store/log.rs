//! Reading and following the log.

use std::sync::Arc;

use annals::{EventStore, Expected, LogQuery, Position, Recorded};
use tokio::time::timeout;

use super::{PROMPTLY, StoreUnderTest, append, appending, at, event, key, numbered, put, putting, stream, whole_log};

/// The order of events does not depend on the page size.
pub async fn pages_follow_each_other_in_order<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    for round in 0..7 {
        store.commit(appending(["a-1", "b-1"].map(|name| append(name, at(round * 5), numbered(5))))).await.unwrap();
    }
    let all = whole_log(&*store).await;
    assert_eq!(all.len(), 70);
    for limit in [1, 3, 10, 69, 70, 71, 1_000, usize::MAX] {
        let mut seen = Vec::new();
        let mut after = Position::START;
        loop {
            let page = store.read_log(&LogQuery::all(), after, limit).await.unwrap();
            assert!(page.events.len() <= limit);
            if page.next == after {
                assert!(page.events.is_empty());
                break;
            }
            assert!(page.next >= page.events.last().map_or(after, |event| event.position));
            after = page.next;
            seen.extend(page.events);
        }
        assert_eq!(seen, all, "in pages of {limit}");
    }
    let page = store.read_log(&LogQuery::all(), Position::START, 0).await.unwrap();
    assert_eq!((page.events.len(), page.next, page.more), (0, Position::START, false));
}

/// A subscription to one category must not read the rest of the log again with each page.
pub async fn query_skips_other_events_and_advances<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    for round in 0..20 {
        let events = |placed: &'static str| vec![event(placed, "{}"), event("thing.happened", "{}")];
        let order = append("order-1", at(round * 2), events("order.placed"));
        let orders = append("orders-1", at(round * 2), events("orders.closed"));
        let more = append("order.line-order-1", at(round * 2), events("order.placed"));
        store.commit(appending([order, orders, more])).await.unwrap();
    }
    let all = whole_log(&*store).await;
    let head = all.last().unwrap().position;
    let queries = [
        (LogQuery::categories(["order"]), 40),
        (LogQuery::categories(["orders"]), 40),
        (LogQuery::categories(["order.line"]), 40),
        (LogQuery::categories(["order", "orders", "nothing"]), 80),
        (LogQuery::types(["order.placed"]), 40),
        (LogQuery::types(["order.placed", "orders.closed"]), 60),
        (LogQuery { categories: vec!["order".into()], types: vec!["order.placed".into()] }, 20),
        (LogQuery::categories(["ord"]), 0),
        (LogQuery::categories(["Order"]), 0),
        (LogQuery::categories([""]), 0),
        (LogQuery::types(["order"]), 0),
        (LogQuery::types(["%"]), 0),
    ];
    for (query, count) in queries {
        let expected = all.iter().filter(|event| query.matches(event)).cloned().collect::<Vec<_>>();
        assert_eq!(expected.len(), count, "{query:?}");
        for limit in [1, 7, 1_000] {
            let mut seen = Vec::new();
            let mut after = Position::START;
            loop {
                let page = store.read_log(&query, after, limit).await.unwrap();
                assert!(page.events.len() <= limit);
                if page.next == after {
                    break;
                }
                after = page.next;
                seen.extend(page.events);
            }
            assert_eq!(seen, expected, "{query:?} in pages of {limit}");
            assert_eq!(after, head, "{query:?} goes past what it leaves out");
        }
    }
}

/// A page may cover only a part of the log, and must then report that there is more. Otherwise a reader would treat the
/// page as the last one, and would wait although it is far behind.
pub async fn page_reports_whether_it_is_the_last<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    for round in 0..5 {
        store.commit(appending([append("many-1", at(round * 5_000), numbered(5_000))])).await.unwrap();
    }
    let last = store.commit(appending([append("one-1", at(0), numbered(1))])).await.unwrap().position;
    let everything = (LogQuery::all(), 25_001);
    for (query, count) in [everything, (LogQuery::categories(["one"]), 1), (LogQuery::categories(["none"]), 0)] {
        for limit in [1_000, 100_000] {
            let mut seen = 0;
            let mut after = Position::START;
            loop {
                let page = store.read_log(&query, after, limit).await.unwrap();
                (seen, after) = (seen + page.events.len(), page.next);
                if !page.more {
                    break;
                }
            }
            assert_eq!((seen, after), (count, last), "{query:?} in pages of {limit}");
        }
        let page = store.read_log(&query, last, 1_000).await.unwrap();
        assert!(!page.more, "{query:?} at the end");
    }
}

/// A reader at the end stays there, including a reader whose query matches no event.
pub async fn caught_up_reader_keeps_its_position<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let queries = [LogQuery::all(), LogQuery::categories(["nothing"])];
    for query in &queries {
        let page = store.read_log(query, Position::START, 10).await.unwrap();
        assert_eq!((page.events.len(), page.next), (0, Position::START));
    }
    let head = store.commit(appending([append("a-1", at(0), numbered(3))])).await.unwrap().position;
    for query in &queries {
        let page = store.read_log(query, head, 10).await.unwrap();
        assert_eq!((page.events.len(), page.next), (0, head));
    }
}

/// A read after a position beyond the end returns no events, even if that position is the largest possible one.
pub async fn far_position_has_no_events_after_it<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    store.commit(appending([append("a-1", at(0), numbered(3))])).await.unwrap();
    for query in [LogQuery::all(), LogQuery::categories(["a"])] {
        for after in [1_000_000, i64::MAX - 1, i64::MAX] {
            let page = store.read_log(&query, Position(after), 10).await.unwrap();
            assert_eq!((page.events.len(), page.next), (0, Position(after)));
        }
        let page = store.read_log(&query, Position(-1), 10).await.unwrap();
        assert_eq!(page.events.len(), 3);
    }
}

/// If events are already there when the wait starts, the wait must return at once.
pub async fn wait_returns_at_once_if_there_are_more_events<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let head = store.commit(appending([append("a-1", at(0), numbered(3))])).await.unwrap().position;
    for after in [-1, 0, head.0 - 1] {
        timeout(PROMPTLY, store.wait(Position(after))).await.expect("the reader must not sleep").unwrap();
    }
}

/// A hundred rounds finish well within the limit, so a notification must wake the wait; polling would be too slow.
pub async fn wait_ends_with_the_next_commit<T: StoreUnderTest>() {
    const ROUNDS: i64 = 100;
    let under_test = T::fresh().await;
    let store = under_test.store();
    let rounds = async {
        let mut head = Position::START;
        for round in 0..ROUNDS {
            let waiting = {
                let store = store.clone();
                tokio::spawn(async move { store.wait(head).await })
            };
            tokio::task::yield_now().await;
            head = store.commit(appending([append("a-1", at(round), numbered(1))])).await.unwrap().position;
            waiting.await.unwrap().unwrap();
        }
    };
    timeout(PROMPTLY, rounds).await.expect("a waiting reader must be woken");
}

/// Many writers and one reader run at once. The reader sees each event exactly once, and never before an earlier event.
pub async fn a_tailing_reader_sees_every_event_once_and_in_order<T: StoreUnderTest>() {
    const WRITERS: usize = 24;
    const COMMITS: usize = 40;
    let under_test = T::fresh().await;
    let store = under_test.store();
    let reading = {
        let store = store.clone();
        tokio::spawn(async move { follow(&*store, WRITERS * COMMITS * 2).await })
    };
    let writing = (0..WRITERS).map(|writer| {
        let store = store.clone();
        tokio::spawn(async move {
            for round in 0..COMMITS {
                let own = append(&format!("own-{writer}"), at(round as i64), numbered(1));
                let shared = append("shared-1", Expected::Any, numbered(1));
                store.commit(appending([own, shared])).await.unwrap();
            }
        })
    });
    for writer in writing.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    let seen = timeout(PROMPTLY * 3, reading).await.expect("the reader must not stay asleep").unwrap();

    assert!(seen.is_sorted_by(|one, next| one.position < next.position));
    for name in (0..WRITERS).map(|writer| format!("own-{writer}")).chain(["shared-1".to_owned()]) {
        let of_stream = seen.iter().filter(|event| event.stream == stream(&name));
        let versions = of_stream.map(|event| event.version.0).collect::<Vec<_>>();
        let count = if name == "shared-1" { WRITERS * COMMITS } else { COMMITS };
        assert_eq!(versions, (1..=count as i64).collect::<Vec<_>>(), "{name}");
    }
    assert_eq!(seen, whole_log(&*store).await);
}

async fn follow(store: &dyn EventStore, count: usize) -> Vec<Arc<Recorded>> {
    let mut seen = Vec::new();
    let mut after = Position::START;
    while seen.len() < count {
        let page = store.read_log(&LogQuery::all(), after, 17).await.unwrap();
        if page.next == after {
            store.wait(after).await.unwrap();
        }
        after = page.next;
        seen.extend(page.events);
    }
    seen
}

/// The head is the position of the last event. A commit of documents does not change the head.
pub async fn the_head_is_the_last_event<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    assert_eq!(store.status().await.unwrap().head, Position::START);
    let head = store.commit(appending([append("a-1", at(0), numbered(3))])).await.unwrap().position;
    let note = put(&key("note", "1"), None, Some("1"));
    let committed = store.commit(putting([note])).await.unwrap();
    assert_eq!((committed.position, committed.versions), (Position::START, vec![]));
    let status = store.status().await.unwrap();
    assert_eq!((status.head, status.waits_for), (head, None));
}
