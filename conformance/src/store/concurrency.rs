//! Many concurrent callers.

use std::sync::Arc;

use annals::{Commit, CommitError, EventStore};
use tokio::task::JoinSet;

use super::{
    StoreUnderTest, append, appending, assert_conflict, at, key, numbered, put, putting, whole_log, whole_stream,
};

/// Each losing writer learns the current version of the stream.
pub async fn one_of_many_writers_at_one_version_wins<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let mut writers = JoinSet::new();
    for _ in 0..50 {
        let store = store.clone();
        writers.spawn(async move { store.commit(appending([append("a-1", at(0), numbered(1))])).await });
    }
    let (won, lost): (Vec<_>, Vec<_>) = writers.join_all().await.into_iter().partition(Result::is_ok);
    assert_eq!(won.len(), 1);
    for outcome in lost {
        assert_conflict(outcome, "a-1", 0, 1);
    }
    assert_eq!(whole_stream(&*store, "a-1").await.len(), 1);
}

/// If a commit reports when its events were recorded, a reader of the log may also rely on the reported positions.
pub async fn commit_returns_the_positions_of_its_events<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    let mut writers = JoinSet::new();
    for writer in 0..16 {
        let store = store.clone();
        writers.spawn(async move {
            let mut outcomes = Vec::new();
            for round in 0..10 {
                let names = ["left", "right"].map(|side| format!("{side}-{writer}"));
                let appends = names.clone().map(|name| append(&name, at(round * 2), numbered(2)));
                outcomes.push((names, store.commit(appending(appends)).await.unwrap()));
            }
            outcomes
        });
    }
    let outcomes = writers.join_all().await.into_iter().flatten().collect::<Vec<_>>();
    let log = whole_log(&*store).await;
    for (names, committed) in outcomes {
        let end = log.iter().position(|event| event.position == committed.position).unwrap() + 1;
        let found = &log[end - 4..end];
        let Some(recorded_at) = committed.recorded_at else { continue };
        assert!(found.iter().all(|event| event.recorded_at == recorded_at), "{recorded_at}: {found:?}");
        let expected =
            names.iter().zip(&committed.versions).flat_map(|(name, last)| [(name, last.0 - 1), (name, last.0)]);
        let first = committed.position.0 - 3;
        for (event, ((name, version), position)) in found.iter().zip(expected.zip(first..)) {
            let found = (event.stream.as_str(), event.version.0, event.position.0);
            assert_eq!(found, (&**name, version, position));
        }
    }
}

/// Commits that share a round trip succeed or fail independently of each other.
pub async fn conflict_fails_only_its_own_commit<T: StoreUnderTest>() {
    let under_test = T::fresh().await;
    let store = under_test.store();
    store.commit(appending([append("taken-1", at(0), numbered(1))])).await.unwrap();
    store.commit(putting([put(&key("taken", "1"), Some(0), Some("1"))])).await.unwrap();
    let commit = |number: i64| {
        let mut commit = appending([append(&format!("free-{number}"), at(0), numbered(2))]);
        match number % 4 {
            1 => commit.appends.push(append("taken-1", at(0), numbered(1))),
            3 => commit.puts.push(put(&key("taken", "1"), Some(0), Some("2"))),
            _ => commit.puts.push(put(&key("free", &number.to_string()), Some(0), Some("1"))),
        }
        commit
    };
    let mut writers = JoinSet::new();
    for number in 0..200 {
        let store = store.clone();
        writers.spawn(async move { (number, store.commit(commit(number)).await) });
    }
    for (number, outcome) in writers.join_all().await {
        let holds = number % 2 == 0;
        match outcome {
            Ok(_) => assert!(holds, "{number}"),
            Err(CommitError::Conflict { .. }) => assert_eq!(number % 4, 1),
            Err(CommitError::DocumentConflict { .. }) => assert_eq!(number % 4, 3),
            Err(other) => panic!("{number}: {other}"),
        }
        let events = whole_stream(&*store, &format!("free-{number}")).await.len();
        let document = store.documents(&[key("free", &number.to_string())]).await.unwrap().remove(0);
        assert_eq!((events, document.is_some()), if holds { (2, true) } else { (0, false) }, "{number}");
    }
    assert_eq!(whole_stream(&*store, "taken-1").await.len(), 1);
}

/// Each caller reads a number, adds one, writes it, and repeats all of this after a conflict. The document and the
/// stream must show the same count.
pub async fn concurrent_increments_lose_nothing<T: StoreUnderTest>() {
    const WRITERS: i64 = 16;
    const ROUNDS: i64 = 10;
    let under_test = T::fresh().await;
    let store = under_test.store();
    let mut writers = JoinSet::new();
    for _ in 0..WRITERS {
        let store = store.clone();
        writers.spawn(async move {
            for _ in 0..ROUNDS {
                while !count_up(&store).await {}
            }
        });
    }
    writers.join_all().await;
    let found = store.documents(&[key("count", "1")]).await.unwrap().remove(0).unwrap();
    assert_eq!((found.version, &*found.body), (WRITERS * ROUNDS, &*(WRITERS * ROUNDS).to_string()));
    assert_eq!(whole_stream(&*store, "count-1").await.len() as i64, WRITERS * ROUNDS);
}

async fn count_up(store: &Arc<dyn EventStore>) -> bool {
    let key = key("count", "1");
    let found = store.documents(std::slice::from_ref(&key)).await.unwrap().remove(0);
    let (version, count) = found.map_or((0, 0), |found| (found.version, found.body.parse::<i64>().unwrap()));
    let counted = put(&key, Some(version), Some(&(count + 1).to_string()));
    let commit = Commit { puts: vec![counted], ..appending([append("count-1", at(count), numbered(1))]) };
    match store.commit(commit).await {
        Ok(_) => true,
        Err(CommitError::Conflict { .. } | CommitError::DocumentConflict { .. }) => false,
        Err(other) => panic!("{other}"),
    }
}

/// If a caller drops its commit, the commit is applied completely or not at all, and no other caller is affected.
pub async fn dropped_commits_are_complete_or_absent<T: StoreUnderTest>() {
    const COMMITS: usize = 1_000;
    let under_test = T::fresh().await;
    let store = under_test.store();
    let mut kept = Vec::new();
    for number in 0..COMMITS {
        let task = {
            let store = store.clone();
            tokio::spawn(async move { store.commit(spread(number)).await })
        };
        match number % 10 {
            0 => kept.push((number, task)),
            odd if odd % 2 == 1 => {
                tokio::task::yield_now().await;
                task.abort();
            }
            _ => task.abort(),
        }
    }
    for (number, task) in kept {
        task.await.unwrap().unwrap();
        assert_eq!(parts(&*store, number).await, (true, true, true), "{number} was kept");
    }
    for number in 0..COMMITS {
        // A commit may still arrive between two reads. Therefore the first read decides what the second read must find.
        let (one, other, document) = parts(&*store, number).await;
        if one || other || document {
            assert_eq!(parts(&*store, number).await, (true, true, true), "{number} is there in part");
        }
    }
    let after = (COMMITS..COMMITS + 200).map(|number| store.commit(spread(number))).collect::<Vec<_>>();
    for outcome in futures::future::join_all(after).await {
        outcome.unwrap();
    }
}

fn spread(number: usize) -> Commit {
    let appends = ["one", "other"].map(|category| append(&format!("{category}-{number}"), at(0), numbered(2)));
    Commit { appends: appends.into(), puts: vec![put(&key("spread", &number.to_string()), Some(0), Some("1"))] }
}

async fn parts(store: &dyn EventStore, number: usize) -> (bool, bool, bool) {
    let one = whole_stream(store, &format!("one-{number}")).await.len();
    let other = whole_stream(store, &format!("other-{number}")).await.len();
    assert!([0, 2].contains(&one) && [0, 2].contains(&other), "half an append");
    let document = store.documents(&[key("spread", &number.to_string())]).await.unwrap().remove(0);
    (one == 2, other == 2, document.is_some())
}

/// The two commits write different things, but each is valid only if the thing that the other commit writes is absent.
/// A document that stays absent has no version that could change, so only a check of its absence detects the conflict.
pub async fn one_of_two_commits_relying_on_absence_succeeds<T: StoreUnderTest>() {
    const ROUNDS: usize = 60;
    let under_test = T::fresh().await;
    let store = under_test.store();
    for round in 0..ROUNDS {
        for (kind, commits) in relying_on_absence(round).into_iter().enumerate() {
            let mut writers = JoinSet::new();
            for commit in commits {
                let store = store.clone();
                writers.spawn(async move { store.commit(commit).await });
            }
            let held = writers.join_all().await.into_iter().filter(|outcome| match outcome {
                Ok(_) => true,
                Err(CommitError::Conflict { .. } | CommitError::DocumentConflict { .. }) => false,
                Err(unexpected) => panic!("{unexpected}"),
            });
            assert_eq!(held.count(), 1, "kind {kind}, round {round}");
        }
    }
}

/// Returns pairs of commits that contradict each other: through a few documents, through many documents, through
/// streams, and through one document and one stream.
pub fn relying_on_absence(round: usize) -> Vec<[Commit; 2]> {
    let name = |kind: &str, side: usize| format!("{kind}{side}-{round}");
    let sides = [[0, 1], [1, 0]];
    let absent = |kind: &str, side: usize| put(&key("absent", &name(kind, side)), Some(0), None);
    let present = |kind: &str, side: usize| put(&key("absent", &name(kind, side)), None, Some("{}"));
    let documents = sides.map(|[own, other]| putting([absent("few", other), present("few", own)]));
    let many = sides.map(|[own, other]| {
        let others =
            (0..40).map(|number| put(&key(&format!("other{own}{round}"), &number.to_string()), None, Some("{}")));
        putting(others.chain([absent("many", other), present("many", own)]))
    });
    let streams = sides.map(|[own, other]| {
        appending([append(&name("s", other), at(0), Vec::new()), append(&name("s", own), at(0), numbered(1))])
    });
    let stream = name("t", 0);
    let mixed = [
        Commit { appends: vec![append(&stream, annals::Expected::Any, numbered(1))], puts: vec![absent("mixed", 0)] },
        Commit { appends: vec![append(&stream, at(0), Vec::new())], puts: vec![present("mixed", 0)] },
    ];
    vec![documents, many, streams, mixed]
}
