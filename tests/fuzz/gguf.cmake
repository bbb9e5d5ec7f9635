# gguf_corpus.c writes the corpus anew: run gguf_corpus FOLDER and commit what changed.
moed_fuzz(gguf LIBS moed_model)
moed_program(gguf_corpus ${CMAKE_CURRENT_LIST_DIR}/gguf_corpus.c)
target_link_libraries(gguf_corpus PRIVATE moed_model)
