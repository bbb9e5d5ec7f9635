moed_test(test_gate LABEL unit TIMEOUT 60 SOURCES unit/test_gate.c LIBS moed_router m)
moed_test(test_plan LABEL unit TIMEOUT 60 SOURCES unit/test_plan.c LIBS moed_router m)
