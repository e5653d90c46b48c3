//! Tests the HTTP interface of the order service as a client sees it.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

mod serving;

use std::{
    io::{BufRead, BufReader, Write},
    time::{Duration, Instant},
};

use annals_http::{BODY_BYTES_MAX, BODY_TIME_MAX};
use serde_json::{Value, json};
use sqlx::{Connection, SqliteConnection, sqlite::SqliteConnectOptions};

use self::serving::{Serving, read_answer};

fn order(quantity: u32) -> Value {
    json!({"customer": "17850", "lines": [{"sku": "85123A", "quantity": quantity, "unit_price": "2.55"}]})
}

/// Returns a running shop with some stock.
fn stocked() -> Serving {
    let shop = Serving::all("memory:");
    let delivered =
        shop.post("/supplies", "first delivery", &json!({"delivered": [{"sku": "85123A", "quantity": 100}]}));
    assert_eq!(delivered.status, 201, "{delivered:?}");
    let booked = shop.get("/supplies/first%20delivery?wait=30s").json();
    assert_eq!(booked["saga"]["status"], "completed", "{booked}");
    shop
}

#[test]
fn order_completes_and_shows_its_progress() {
    let shop = stocked();
    let placed = shop.post("/orders", "536365", &order(6));
    assert_eq!((placed.status, placed.header("location")), (201, Some("/orders/536365")), "{placed:?}");
    assert_eq!(placed.json(), json!({"order_id": "536365", "total": "15.30", "currency": "GBP"}));
    assert_eq!(placed.header("idempotency-replayed"), None);
    let order = shop.get("/orders/536365?wait=30s").json();
    assert_eq!((&order["status"], &order["saga"]["status"]), (&json!("confirmed"), &json!("completed")), "{order}");
    let steps: Vec<_> = order["saga"]["timeline"].as_array().unwrap().iter().map(|moment| &moment["step"]).collect();
    let expected =
        ["reserve stock", "reserve stock", "charge card", "confirm order", "ship", "notify customer"].map(Value::from);
    assert_eq!(steps, expected.iter().collect::<Vec<_>>(), "{order}");

    let line = json!([{"sku": "85123A", "quantity": 2, "unit_price": "2.55"}]);
    assert_eq!(shop.post("/returns", "C1", &json!({"customer": "17850", "lines": line})).status, 201);
    assert_eq!(shop.get("/returns/C1?wait=30").json()["status"], "completed");
    assert_eq!(
        shop.post("/supplies", "found", &json!({"adjusted": [{"sku": "85123A", "quantity": -1000}]})).status,
        201
    );
    shop.get("/supplies/found?wait=30s");

    assert_eq!(shop.ask("POST", "/closings", &[("idempotency-key", "evening")], "").status, 201);
    let closing = shop.get("/closings/evening?wait=30s").json();
    let expected = json!({
        "orders": 1, "confirmed": 1, "cancelled": {}, "returns": 1, "adjustments": 1, "charged": "15.30", "refunded": "5.10",
        "units": {"initial": 100, "sold": 6, "returned": 2, "adjusted": -96, "remaining": 0, "reserved": 0},
    });
    assert_eq!(closing["books"], expected);

    let ready = shop.get("/readyz");
    assert_eq!((ready.status, &ready.json()["status"]), (200, &json!("ready")), "{ready:?}");
    assert_eq!(shop.get("/healthz").json(), json!({"status": "ok"}));
    let metrics = shop.get("/metrics").text;
    for line in [
        "annals_http_requests_total{method=\"POST\",route=\"/orders\",status=\"201\"} 1",
        "shop_taken_in_total{kind=\"order\"} 1",
        "annals_sagas_ended_total{saga=\"checkout\",status=\"completed\"} 1",
        "annals_part_state{part=\"order.relay/0\",state=\"fine\"} 1",
        "annals_lag_events{reader=\"order.checkout.start/0\"} ",
        "annals_log_readers_wait 0",
        "annals_store_up 1",
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
}

#[test]
fn events_of_an_order_are_sent_live() {
    let shop = stocked();
    let description = shop.get("/openapi.json").json();
    assert!(description["paths"]["/events"]["get"].is_object(), "{description}");
    let mut stream = shop.connect();
    write!(stream, "GET /events?category=order,payment HTTP/1.1\r\nHost: shop\r\n\r\n").unwrap();
    let mut lines = BufReader::new(stream).lines();
    assert!(lines.by_ref().any(|line| line.unwrap() == "retry: 1000"));
    shop.post("/orders", "536365", &order(6));
    let types = lines.filter_map(|line| line.unwrap().strip_prefix("event: ").map(str::to_owned));
    let found: Vec<_> = types.take_while(|name| name != "order.confirmed").collect();
    assert_eq!(found, ["order.placed", "payment.charged"]);
}

#[test]
fn repeated_idempotency_key_places_one_order() {
    let shop = stocked();
    let first = shop.post("/orders", "a key", &order(1));
    let again = shop.post("/orders", "a key", &order(1));
    assert_eq!((again.status, &again.text), (201, &first.text));
    assert_eq!(again.header("idempotency-replayed"), Some("true"));
    // Sends the key in quotes, as the IETF draft for the header `Idempotency-Key` specifies.
    assert_eq!(shop.post("/orders", "\"a key\"", &order(1)).text, first.text);
    shop.post("/orders", "a key", &order(2)).is_problem(422, &["another body"]);
    // The same key for another kind of resource is a different key.
    assert_eq!(shop.post("/returns", "a key", &order(1)).status, 201);
    // Without a key, each request creates a new order.
    let headers = [("content-type", "application/json")];
    let [one, two] = [1, 1].map(|quantity| shop.ask("POST", "/orders", &headers, &order(quantity).to_string()).json());
    assert_ne!(one["order_id"], two["order_id"]);

    // Sends many requests at once.
    let answers: Vec<_> = std::thread::scope(|scope| {
        let asked: Vec<_> = (0..16).map(|_| scope.spawn(|| shop.post("/orders", "at once", &order(3)))).collect();
        asked.into_iter().map(|asked| asked.join().unwrap()).collect()
    });
    let first = answers.iter().filter(|answer| answer.header("idempotency-replayed").is_none()).count();
    assert_eq!(first, 1, "{answers:?}");
    assert!(answers.iter().all(|answer| answer.status == 201 && answer.text == answers[0].text), "{answers:?}");
    let bodies: Vec<_> = std::thread::scope(|scope| {
        let shop = &shop;
        let asked: Vec<_> =
            (1..=8).map(|n| scope.spawn(move || shop.post("/orders", "fight", &order(n)).status)).collect();
        asked.into_iter().map(|asked| asked.join().unwrap()).collect()
    });
    assert_eq!(bodies.iter().filter(|status| **status == 201).count(), 1, "{bodies:?}");
    assert_eq!(bodies.iter().filter(|status| **status == 422).count(), 7, "{bodies:?}");
}

/// The metadata of the order's first event shows which headers were accepted.
#[tokio::test]
async fn only_valid_w3c_trace_context_is_propagated() {
    const TRACE: &str = "12345678901234567890123456789012";
    const PARENT: &str = "1234567890123456";
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("shop.db");
    let shop = Serving::all(&format!("sqlite:{}", path.display()));
    let valid = format!("00-{TRACE}-{PARENT}-01");
    let other = format!("00-{}-{PARENT}-01", "9".repeat(32));
    let cases: Vec<(Vec<(&str, String)>, Value)> = vec![
        (vec![("traceparent", valid.clone())], json!([valid, null])),
        (vec![("Traceparent", format!(" \t{valid} \t"))], json!([valid, null])),
        (vec![("traceparent", format!("00-{}-{PARENT}-01", "0".repeat(32)))], json!([null, null])),
        (vec![("traceparent", format!("00-{TRACE}-{}-01", "0".repeat(16)))], json!([null, null])),
        (vec![("traceparent", format!("ff-{TRACE}-{PARENT}-01"))], json!([null, null])),
        (vec![("traceparent", format!("cc-{TRACE}-{PARENT}-01-what-the-future-will-be-like"))], json!([valid, null])),
        (vec![("traceparent", valid.clone()), ("traceparent", other)], json!([null, null])),
        (vec![("traceparent", valid.clone()), ("tracestate", "foo=1".into())], json!([valid, "foo=1"])),
        (
            vec![("tracestate", "foo=1".into()), ("traceparent", valid.clone()), ("tracestate", "bar=2".into())],
            json!([valid, "foo=1,bar=2"]),
        ),
        (vec![("traceparent", valid.clone()), ("tracestate", "FOO".into())], json!([valid, null])),
        (vec![("traceparent", "none".into()), ("tracestate", "foo=1".into())], json!([null, null])),
    ];
    let mut file = SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(&path)).await.unwrap();
    for (number, (headers, right)) in cases.iter().enumerate() {
        let key = format!("t{number}");
        let json_headers = [("content-type", "application/json"), ("idempotency-key", &*key)];
        let headers: Vec<_> =
            json_headers.into_iter().chain(headers.iter().map(|(name, value)| (*name, &**value))).collect();
        assert_eq!(shop.ask("POST", "/orders", &headers, &order(1).to_string()).status, 201);
        let stored =
            sqlx::query_scalar::<_, String>("SELECT metadata FROM events WHERE stream_id = $1 AND version = 1");
        let stored = stored.bind(format!("order-{key}")).fetch_one(&mut file).await.unwrap();
        let stored: Value = serde_json::from_str(&stored).unwrap();
        assert_eq!(json!([stored["traceparent"], stored["tracestate"]]), *right, "{headers:?}");
    }
}

#[test]
fn rejected_request_gives_a_problem_with_the_reason() {
    let shop = Serving::all("memory:");
    let json_headers = [("content-type", "application/json")];
    let sent = |body: &str| shop.ask("POST", "/orders", &json_headers, body);
    sent("").is_problem(400, &["not JSON"]);
    sent("{").is_problem(400, &["not JSON"]);
    sent(&format!("{{\"lines\": {}", "[".repeat(10_000))).is_problem(400, &["not JSON"]);
    sent("[]").is_problem(422, &["does not have the expected shape"]);
    sent("{}").is_problem(422, &["missing field `lines`"]);
    sent(r#"{"lines": [], "coupon": 1}"#).is_problem(422, &["unknown field `coupon`"]);
    sent(r#"{"lines": []}"#).is_problem(422, &["at least one line"]);
    let with = |sku: &str, quantity: &str, price: &str| {
        sent(&format!(r#"{{"lines": [{{"sku": {sku}, "quantity": {quantity}, "unit_price": {price}}}]}}"#))
    };
    with("\"a\"", "0", "\"1\"").is_problem(422, &["the quantity is 0"]);
    with("\"a\"", "-1", "\"1\"").is_problem(422, &["invalid value"]);
    with("\"a\"", "5000000000", "\"1\"").is_problem(422, &["invalid value"]);
    with("\"a\"", "1", "\"-1\"").is_problem(422, &["negative"]);
    with("\"a\"", "1", "\"0.00001\"").is_problem(422, &["more than 4 decimals"]);
    for price in ["many", "1e2", "1_000", "+1", ""] {
        with("\"a\"", "1", &format!("\"{price}\"")).is_problem(422, &["not an amount", price]);
    }
    with("\"a\"", "1", "\"1\", \"discount\": \"0.5\"").is_problem(422, &["unknown field `discount`"]);
    with("\"\"", "1", "\"1\"").is_problem(422, &["the SKU is empty"]);
    with("\"a\\nb\"", "1", "\"1\"").is_problem(422, &["control character"]);
    with(&format!("\"{}\"", "a".repeat(201)), "1", "\"1\"").is_problem(422, &["more than 200 bytes"]);
    with("\"a\"", "4000000000", "\"79228162514264337593543950335\"").is_problem(422, &["too large"]);
    sent(r#"{"lines": [], "card": "stolen"}"#).is_problem(422, &["unknown variant `stolen`"]);
    sent(r#"{"customer": "", "lines": []}"#).is_problem(422, &["the customer is empty"]);
    let line = r#"{"sku":"a","quantity":1,"unit_price":"1"}"#;
    sent(&format!(r#"{{"lines": [{}]}}"#, vec![line; 5_001].join(","))).is_problem(422, &["5001 lines"]);
    shop.ask("POST", "/orders", &[], "{}").is_problem(415, &["must be application/json"]);
    shop.ask("POST", "/orders", &[("content-type", "text/plain")], "{}").is_problem(415, &["text/plain"]);
    for key in ["", "\"\"", "k".repeat(201).as_str()] {
        shop.post("/orders", key, &order(1)).is_problem(400, &["Idempotency-Key"]);
    }
    let two = [("content-type", "application/json"), ("idempotency-key", "a"), ("idempotency-key", "b")];
    shop.ask("POST", "/orders", &two, &order(1).to_string()).is_problem(400, &["one Idempotency-Key"]);
    let supply = |body: Value| shop.post("/supplies", "s", &body);
    supply(json!({"delivered": []})).is_problem(422, &["0 SKUs"]);
    supply(json!({"delivered": [{"sku": "a", "quantity": 0}]})).is_problem(422, &["a: 0 units"]);
    supply(json!({"adjusted": [{"sku": "a", "quantity": 1}, {"sku": "a", "quantity": 1}]})).is_problem(422, &["twice"]);
    supply(json!({"stolen": []})).is_problem(422, &["unknown field `stolen`"]);

    for path in ["/orders/none", "/returns/none", "/supplies/none", "/closings/none"] {
        shop.get(path).is_problem(404, &["there is no", "none"]);
        // The answer comes at once, although the request allows a wait.
        shop.get(&format!("{path}?wait=30s")).is_problem(404, &["none"]);
    }
    shop.ask("POST", "/orders/none/cancel", &[], "").is_problem(404, &["no order none"]);
    shop.get("/orders/none?wait=long").is_problem(400, &["wait=10s"]);
    shop.get("/orders/none?weight=1").is_problem(400, &["unknown field"]);
    shop.get("/orders/%ff").is_problem(400, &[]);
    shop.get("/orders/a%0ab").is_problem(400, &["control character"]);
    shop.get("/nothing").is_problem(404, &["/nothing"]);
    shop.ask("DELETE", "/orders/1", &[], "").is_problem(405, &["DELETE"]);
    shop.ask("POST", "/metrics", &[], "").is_problem(405, &["POST"]);
}

#[test]
fn body_is_limited_in_bytes_and_time() {
    let shop = Serving::all("memory:");
    let headers = [("content-type", "application/json")];
    let large = format!("{{\"customer\": \"{}\"}}", "x".repeat(BODY_BYTES_MAX));
    shop.ask("POST", "/orders", &headers, &large).is_problem(413, &["1000000 bytes"]);
    // This body declares its length and never arrives.
    let mut declared = shop.connect();
    let head = "POST /orders HTTP/1.1\r\nhost: shop\r\nconnection: close\r\ncontent-length: 2000000\r\n\r\n{";
    let started = std::time::Instant::now();
    declared.write_all(head.as_bytes()).unwrap();
    read_answer(&mut declared).unwrap().is_problem(413, &["1000000 bytes"]);
    assert!(started.elapsed() < BODY_TIME_MAX, "{:?}", started.elapsed());
    // This body has no declared length.
    let mut chunked =
        b"POST /orders HTTP/1.1\r\nhost: shop\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
    for _ in 0..20 {
        chunked.extend_from_slice(b"10000\r\n");
        chunked.extend_from_slice(&[b' '; 0x10000]);
        chunked.extend_from_slice(b"\r\n");
    }
    shop.send(&chunked).is_problem(413, &["1000000 bytes"]);

    // This body arrives one byte at a time, with pauses.
    let mut slow = shop.connect();
    let head = "POST /orders HTTP/1.1\r\nhost: shop\r\nconnection: close\r\ncontent-length: 1000\r\n\r\n";
    slow.write_all(head.as_bytes()).unwrap();
    let started = std::time::Instant::now();
    let mut dripping = slow.try_clone().unwrap();
    std::thread::spawn(move || {
        while dripping.write_all(b" ").is_ok() {
            std::thread::sleep(Duration::from_millis(200));
        }
    });
    read_answer(&mut slow).unwrap().is_problem(408, &["10 s"]);
    let took = started.elapsed();
    assert!((BODY_TIME_MAX..BODY_TIME_MAX * 3).contains(&took), "{took:?}");
    assert_eq!(shop.get("/healthz").status, 200);
}

/// A single request submits an order, a return or a supply, and waits for the end of its saga.
#[test]
fn submission_can_wait_for_its_end() {
    let shop = stocked();
    let started = Instant::now();
    let placed = shop.post("/orders?wait=30s", "1", &order(6));
    assert_eq!((placed.status, placed.header("location")), (201, Some("/orders/1")), "{placed:?}");
    assert_eq!(placed.header("idempotency-replayed"), None);
    assert_eq!(
        (&placed.json()["status"], &placed.json()["saga"]["status"]),
        (&json!("confirmed"), &json!("completed"))
    );
    // The answer equals the view that a client reads later.
    assert_eq!(placed.json(), shop.get("/orders/1").json());
    let again = shop.post("/orders?wait=30s", "1", &order(6));
    assert_eq!((again.status, again.header("idempotency-replayed")), (201, Some("true")), "{again:?}");
    assert_eq!(again.json(), placed.json());
    shop.post("/orders?wait=30s", "1", &order(7)).is_problem(422, &["another body"]);

    let turned_down = shop.post("/orders?wait=30s", "2", &order(600)).json();
    assert_eq!((&turned_down["status"], &turned_down["saga"]["status"]), (&json!("cancelled"), &json!("compensated")));
    assert_eq!(turned_down, shop.get("/orders/2").json());

    let line = json!([{"sku": "85123A", "quantity": 2, "unit_price": "2.55"}]);
    let returned = shop.post("/returns?wait=30s", "C1", &json!({"customer": "17850", "lines": line})).json();
    assert_eq!((&returned["status"], &returned), (&json!("completed"), &shop.get("/returns/C1").json()));
    let adjusted = json!({"adjusted": [{"sku": "85123A", "quantity": -1}]});
    let booked = shop.post("/supplies?wait=30s", "found", &adjusted).json();
    assert_eq!((&booked["saga"]["status"], &booked), (&json!("completed"), &shop.get("/supplies/found").json()));
    let closing = shop.ask("POST", "/closings?wait=30s", &[("idempotency-key", "evening")], "").json();
    assert_eq!(
        (&closing["books"]["units"]["remaining"], &closing),
        (&json!(95), &shop.get("/closings/evening").json())
    );

    // No request waited for the maximum time.
    assert!(started.elapsed() < Duration::from_secs(25), "{:?}", started.elapsed());
    // A request with an invalid query has no effect.
    shop.post("/orders?wait=long", "3", &order(1)).is_problem(400, &["wait=10s"]);
    shop.post("/orders?weight=1", "3", &order(1)).is_problem(400, &["weight"]);
    shop.get("/orders/3").is_problem(404, &["3"]);
}

#[test]
fn order_can_be_cancelled_until_it_is_confirmed() {
    let shop = Serving::all("memory:");
    // There is no stock, so the checkout may cancel the order before the request does.
    shop.post("/orders", "1", &order(1));
    let cancelled = shop.ask("POST", "/orders/1/cancel", &[], "");
    assert_eq!((cancelled.status, &cancelled.json()["status"]), (200, &json!("cancelled")), "{cancelled:?}");
    // A repeated request changes nothing.
    assert_eq!(shop.ask("POST", "/orders/1/cancel", &[], "").text, cancelled.text);
    let ended = shop.get("/orders/1?wait=30s").json();
    assert_eq!((&ended["status"], &ended["saga"]["status"]), (&json!("cancelled"), &json!("compensated")), "{ended}");

    let shop = stocked();
    shop.post("/orders", "kept", &order(1));
    assert_eq!(shop.get("/orders/kept?wait=30s").json()["status"], "confirmed");
    shop.ask("POST", "/orders/kept/cancel", &[], "").is_problem(409, &["the order is confirmed"]);

    // Cancels orders while their checkouts run. Some cancellations come in time and some too late, and the totals must
    // match.
    let mut in_time = 0;
    for n in 0..40 {
        let id = format!("race-{n}");
        assert_eq!(shop.post("/orders", &id, &order(1)).status, 201);
        in_time += usize::from(shop.ask("POST", &format!("/orders/{id}/cancel"), &[], "").status == 200);
    }
    for n in 0..40 {
        let ended = shop.get(&format!("/orders/race-{n}?wait=30s")).json();
        assert!(ended["saga"]["ended_at"].is_string(), "{ended}");
    }
    assert!(in_time > 0, "no order was cancelled while its checkout ran");
    shop.ask("POST", "/closings", &[("idempotency-key", "end")], "");
    let books = shop.get("/closings/end?wait=30s").json()["books"].clone();
    assert_eq!(books["cancelled"]["by_customer"].as_u64().unwrap_or(0) as usize, in_time, "{books}");
    let sold = 41 - in_time;
    assert_eq!((&books["confirmed"], &books["units"]["sold"]), (&json!(sold), &json!(sold)), "{books}");
    assert_eq!((&books["units"]["reserved"], &books["units"]["remaining"]), (&json!(0), &json!(100 - sold)), "{books}");
}

#[test]
fn card_number_decides_its_payment() {
    let shop = stocked();
    let with = |card: &str| {
        let mut order = order(1);
        order["card"] = card.into();
        assert_eq!(shop.post("/orders", card, &order).status, 201);
        shop.get(&format!("/orders/{card}?wait=30s")).json()
    };
    let declined = with("declined");
    assert_eq!((&declined["status"], &declined["reason"]), (&json!("cancelled"), &json!("declined")));
    let withdrawn = with("withdrawn");
    assert_eq!((&withdrawn["status"], &withdrawn["reason"]), (&json!("cancelled"), &json!("by_customer")));
    let outcomes: Vec<_> =
        withdrawn["saga"]["timeline"].as_array().unwrap().iter().map(|m| m["outcome"].clone()).collect();
    assert!(outcomes.contains(&json!("refused")), "the pivot is refused: {withdrawn}");
    assert_eq!(with("good")["status"], "confirmed");
}
