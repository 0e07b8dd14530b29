;; Flushes standard output. wasmtime keeps the last incomplete line that a component writes without flushing it, and only
;; another component can flush it.
(component
  (import "wasi:io/error@0.2.0" (instance $errors (export "error" (type (sub resource)))))
  (alias export $errors "error" (type $error))
  (import "wasi:io/streams@0.2.0" (instance $streams
    (export "output-stream" (type $stream (sub resource)))
    (alias outer 1 $error (type $error))
    (type $failure (variant (case "last-operation-failed" (own $error)) (case "closed")))
    (export "stream-error" (type $stream-error (eq $failure)))
    (export "[method]output-stream.blocking-flush" (func (param "self" (borrow $stream))
      (result (result (error $stream-error)))))))
  (alias export $streams "output-stream" (type $stream))
  (import "wasi:cli/stdout@0.2.0" (instance $stdout (export "get-stdout" (func (result (own $stream))))))
  (core module $results (memory (export "memory") 1))
  (core instance $results (instantiate $results))
  (alias core export $results "memory" (core memory $memory))
  (core func $get (canon lower (func $stdout "get-stdout")))
  (core func $flush (canon lower (func $streams "[method]output-stream.blocking-flush") (memory $memory)))
  (core module $main
    (import "wasi" "get" (func $get (result i32)))
    (import "wasi" "flush" (func $flush (param i32 i32)))
    (func (export "flush") (call $flush (call $get) (i32.const 0))))
  (core instance $main (instantiate $main
    (with "wasi" (instance (export "get" (func $get)) (export "flush" (func $flush))))))
  (func (export "flush") (canon lift (core func $main "flush"))))
